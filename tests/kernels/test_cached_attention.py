"""Attention over cached keys: against float64 on the same keys, over every instruction set, its pieces merged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_same_bits, assert_twice_as_good, normal
from tests.kernels.instruction_sets import Kernels, expected
from vpt_kernels import cached_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpp")
KERNELS = Kernels("vpt_cached_attention_kernels")
SHAPES = (
    # tokens, query heads, KV heads, width, cached tokens
    (1, 12, 2, 128, 1),
    (1, 12, 2, 128, 4097),
    (1, 28, 4, 128, 2500),
    (3, 14, 2, 64, 1025),
    (16, 6, 1, 128, 1111),
    (40, 12, 2, 128, 333),
    (97, 4, 2, 32, 97),
    (5, 3, 3, 80, 37),
    (2, 2, 1, 7, 5),
)


def inputs(
    shape: tuple[int, ...], cached: torch.dtype, draw: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, heads, kv_heads, dim, stored = shape
    # Peaked enough that single keys count.
    q = normal(tokens, heads, dim, key=f"q{draw}", scale=2.0)
    keys, values = (normal(stored, kv_heads, dim, key=f"{key}{draw}").to(cached) for key in "kv")
    return q, keys, values


def check(shape: tuple[int, ...], cached: torch.dtype, causal: bool, backend: str) -> None:
    """Errors of several draws of a small shape are judged together: a few numbers are luck."""
    tokens, heads, _, dim, stored = shape
    mask = torch.ones(tokens, stored, dtype=torch.bool).tril_(stored - tokens) if causal else None
    found = []
    for draw in range(1 + 4096 // (tokens * heads * dim)):
        q, keys, values = inputs(shape, cached, draw)
        out, log_sum = cached_attention(q, keys, values, causal=causal, backend=backend)
        wide = [t.double() for t in (q, keys, values)]
        exact, exact_log = cached_attention(*wide, causal=causal, backend="reference")
        rows = [t.transpose(0, 1)[None] for t in (q, keys.float(), values.float())]
        plain = F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        assert (log_sum - exact_log).abs().max() <= 1e-5
        assert out.shape == q.shape and out.is_contiguous() and log_sum.dtype == torch.float32
        found.append((out, plain, exact))
    assert_twice_as_good(*map(torch.stack, zip(*found, strict=True)))


def test_every_instruction_set_is_tested() -> None:
    assert KERNELS.names == expected() and KERNELS.widest == expected()[0]


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("cached", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KERNELS.names)
def test_against_float64(name, shape, cached, causal) -> None:
    with KERNELS(name):
        check(shape, cached, causal, "cpp")


@pytest.mark.parametrize("cached", DTYPES, ids=str)
def test_the_reference_against_float64(cached) -> None:
    check(SHAPES[3], cached, True, "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_merge_by_their_log_sums(backend) -> None:
    q, keys, values = inputs(SHAPES[3], torch.bfloat16)
    whole, log_sum = cached_attention(q, keys, values, backend=backend)
    parts = [
        cached_attention(q, keys[:1000], values[:1000], causal=False, backend=backend),
        cached_attention(q, keys[1000:], values[1000:], backend=backend),
    ]
    logs = torch.stack([log for _, log in parts])
    merged = sum(((log - logs.logsumexp(0)).exp()[..., None] * out for out, log in parts), torch.zeros_like(whole))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logs.logsumexp(0), log_sum)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_half_precision_are_rounded_once(backend, dtype) -> None:
    q, keys, values = inputs(SHAPES[5], dtype)
    q = q.to(dtype)
    out, _ = cached_attention(q, keys, values, backend=backend)
    exact, _ = cached_attention(q.double(), keys.double(), values.double(), backend="reference")
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_cache_and_of_a_packed_product(backend) -> None:
    q, keys, values = inputs(SHAPES[1], torch.bfloat16)
    cache = torch.full((2, 5000, 2, 160), float("nan"), dtype=torch.bfloat16)
    cache[0, 7 : 7 + len(keys), :, 16:144], cache[1, 7 : 7 + len(keys), :, 16:144] = keys, values
    views = [part[7 : 7 + len(keys), :, 16:144] for part in cache]
    packed = torch.full((1, 16, 128), float("nan"))
    packed[:, 2:14] = q
    for ours, plain in zip(
        cached_attention(packed[:, 2:14], *views, backend=backend), cached_attention(q, keys, values, backend=backend)
    ):
        assert torch.equal(ours, plain)
    heads_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (keys, values)]
    assert torch.equal(
        cached_attention(q, *heads_first, backend=backend)[0], cached_attention(q, keys, values, backend=backend)[0]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_see_and_nobody_to_see_it(backend) -> None:
    q, keys, values = inputs(SHAPES[0], torch.bfloat16)
    out, log_sum = cached_attention(q, keys[:0], values[:0], causal=False, backend=backend)
    assert not out.any() and (log_sum == float("-inf")).all()
    out, log_sum = cached_attention(q[:0], keys, values, backend=backend)
    assert out.shape == (0, 12, 128) and log_sum.shape == (0, 12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_who_sees_it(backend) -> None:
    q, keys, values = inputs((4, 4, 2, 32, 40), torch.float32)
    keys[38, 0] = float("nan")
    out, _ = cached_attention(q, keys, values, backend=backend)
    assert not out[:2].isnan().any() and out[2:, :2].isnan().all() and not out[2:, 2:].isnan().any()


def test_what_does_not_fit() -> None:
    q, keys, values = inputs(SHAPES[3], torch.bfloat16)
    for wrong, message in (
        ((q, keys, values[1:]), "multiple of Hkv"),
        ((q[:, :3], keys, values), "multiple of Hkv"),
        ((q[..., :5], keys, values), "multiple of Hkv"),
        ((q, keys[:2], values[:2]), "3 tokens and 2 keys"),
        ((q, keys.transpose(1, 2).contiguous().transpose(1, 2), values), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            cached_attention(*wrong)
    for wrong in ((q, keys, values.float()), (q, keys.int(), values.int()), (q, keys, None)):
        with pytest.raises(TypeError):
            cached_attention(*wrong)
    with pytest.raises(ValueError, match="forward only"):
        cached_attention(q.requires_grad_(), keys, values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cached", DTYPES)
def test_keys_and_values_with_strides_of_their_own(cached: torch.dtype, backend: str) -> None:
    """Keys are a view of a wider buffer, values have their heads outside: the same bits as of copies."""
    for shape in ((1, 12, 2, 128, 300), (40, 6, 3, 32, 100), (3, 4, 2, 20, 70)):
        q, keys, values = inputs(shape, cached)
        stored, heads, dim = keys.shape
        wide = torch.full((stored, heads + 3, dim + 12), float("nan")).to(cached)
        wide[:, 1 : heads + 1, 4 : dim + 4] = keys
        outside = torch.full((heads, stored + 5, dim + 4), float("nan")).to(cached)
        outside[:, 2 : stored + 2, :dim] = values.transpose(0, 1)
        views = wide[:, 1 : heads + 1, 4 : dim + 4], outside[:, 2 : stored + 2, :dim].transpose(0, 1)
        found = cached_attention(q, *views, backend=backend)
        for one, other in zip(found, cached_attention(q, keys, values, backend=backend), strict=True):
            assert_same_bits(one, other)


BAD = {
    "wider keys": {"keys": normal(9, 2, 24, key="k")},
    "narrower values": {"values": normal(9, 2, 8, key="v")},
    "fewer values": {"values": normal(8, 2, 16, key="v")},
    "values of more heads": {"values": normal(9, 3, 16, key="v")},
    "heads no multiple": {"q": normal(4, 5, 16, key="q")},
    "no heads": {"keys": normal(9, 0, 16, key="k"), "values": normal(9, 0, 16, key="v")},
    "flat keys": {"keys": normal(9, 32, key="k")},
    "q of four dimensions": {"q": normal(1, 4, 6, 16, key="q")},
    "more tokens than keys": {"keys": normal(3, 2, 16, key="k"), "values": normal(3, 2, 16, key="v")},
    "columns apart": {"keys": normal(9, 2, 32, key="k")[..., ::2]},
    "two dtypes": {"values": normal(9, 2, 16, key="v", dtype=torch.bfloat16)},
    "float64": {"keys": normal(9, 2, 16, key="k").double(), "values": normal(9, 2, 16, key="v").double()},
    "bytes": {"keys": torch.zeros(9, 2, 16, dtype=torch.int8), "values": torch.zeros(9, 2, 16, dtype=torch.int8)},
}


@pytest.mark.parametrize("what", BAD)
def test_operands_that_do_not_fit(what: str) -> None:
    """Past the operator's Python as well: the kernels would read beside the tensors."""
    given = {"q": normal(4, 6, 16, key="q"), "keys": normal(9, 2, 16, key="k"), "values": normal(9, 2, 16, key="v")}
    torch.ops.vpt_kernels.cached_attention.cpp(*given.values(), True)
    given |= BAD[what]
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.vpt_kernels.cached_attention.cpp(*given.values(), True)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        cached_attention(**given, backend="cpp")
