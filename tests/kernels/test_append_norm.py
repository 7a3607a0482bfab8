"""RMSNorm of the heads of q and k before the rotation, in the same call of `append_visual_kv`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from tests.helpers import assert_same_bits, assert_twice_as_good, each_backend, each_dtype, normal, numbers
from tests.kernels.append_checks import each_form, execute
from tests.kernels.append_inputs import Call, make, rotate, stored
from tests.kernels.cache_layouts import CACHES, base, packed
from vpt_kernels import append_visual_kv_

FP8 = torch.float8_e4m3fn
EPS = 1e-6
SHAPES = {
    "qwen3-vl": {"tokens": 33, "heads": (16, 8), "head_dim": 128, "sections": (24, 20, 20)},
    "one token": {"tokens": 1, "heads": (12, 2), "head_dim": 128, "sections": (16, 24, 24)},
    "partial rotary": {"tokens": 21, "heads": (6, 3), "head_dim": 80, "rotary_dim": 32},
    "odd head": {"tokens": 13, "heads": (3, 3), "head_dim": 23, "rotary_dim": 14, "sections": (1, 2, 4)},
    "one pair": {"tokens": 11, "heads": (2, 1), "head_dim": 2, "sections": (0, 0, 1)},
    "wide head": {"tokens": 3, "heads": (2, 1), "head_dim": 256, "sections": (32, 48, 48)},
    "no tokens": {"tokens": 0, "heads": (4, 2), "head_dim": 16},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
NORMS = {"both": (True, True), "q": (True, False), "k": (False, True)}
each_norm = pytest.mark.parametrize("which", NORMS.values(), ids=NORMS)


def weights(call: Call, which: tuple[bool, bool] = (True, True)) -> Call:
    given = []
    for name, wanted in zip(("q_norm", "k_norm"), which, strict=True):
        weight = 1 + normal(call.k.shape[2], key=(name, "weight"), scale=0.3)
        given.append(weight.to(call.k.dtype) if wanted else None)
    return replace(call, q_norm=given[0], k_norm=given[1], norm_eps=EPS)


def module(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """transformers' own RMSNorm, in x's dtype."""
    if weight is None:
        return x
    norm = Qwen3VLTextRMSNorm(x.shape[-1], eps).to(weight.dtype)
    norm.weight.data.copy_(weight)
    with torch.no_grad():
        return norm(x)


def exact(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """In float64 without rounding."""
    x = x.double()
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def check(call: Call, backend: str, in_place: bool, *more: Call) -> None:
    """q and the stored k within the 2× rule of the composition in the same dtype, v copied, all else as it was.

    more: calls of the same shape, judged together with the first: a row's error is its norm's, and few rows are luck.
    """
    found = [run(one, backend, in_place) for one in (call, *more)]
    for name, parts in (("q", 0), ("stored k", 1)):
        assert_twice_as_good(*(torch.cat(each) for each in zip(*(one[parts] for one in found))), name)


def run(call: Call, backend: str, in_place: bool) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Return q and the stored k, each as it is, as PyTorch's composition and in float64; the rest is checked here."""
    before, dtype = replace(call.fresh(), k=call.k.clone(), v=call.v.clone()), call.q.dtype
    q = execute(call, backend, in_place)
    pairs = stored(call.slots, len(call.k_cache))
    tokens, slots = [t for t, _ in pairs], [s for _, s in pairs]
    queries = rotate(module(before.q, call.q_norm), before, dtype), rotate(exact(before.q, call.q_norm), before)
    keys = rotate(module(before.k, call.k_norm), before, dtype), rotate(exact(before.k, call.k_norm), before)
    judged = (q.contiguous(), *queries), (call.k_cache[slots], *(each[tokens] for each in keys))
    assert_same_bits(call.v_cache[slots], before.v[tokens], "stored v")
    for name in ("k", "v") if in_place else ("q", "k", "v"):
        assert_same_bits(getattr(call, name), getattr(before, name), f"input {name}")
    for name in ("k_cache", "v_cache"):
        kept = torch.ones(len(call.k_cache), dtype=torch.bool)
        kept[slots] = False
        assert_same_bits(getattr(call, name)[kept], getattr(before, name)[kept], f"other rows of {name}")
    return judged


@each_backend
@each_dtype
@each_form
@each_shape
def test_normalised_shapes(backend, dtype, in_place, shape):
    keys = [f"norm {number}" for number in range(8 if 0 < shape["tokens"] < 8 else 1)]
    first, *more = (weights(make(dtype=dtype, key=key, **shape)) for key in keys)
    check(first, backend, in_place, *more)


@each_backend
@each_dtype
@each_norm
@pytest.mark.parametrize("interleaved", (False, True), ids=("chunked", "interleaved"))
def test_either_norm_and_sections(backend, dtype, which, interleaved):
    call = make(19, (4, 2), 24, dtype=dtype, rotary_dim=16, sections=(4, 2, 2), key="either")
    check(replace(weights(call, which), interleaved=interleaved), backend, False)


@each_backend
@each_dtype
@each_form
def test_rounded_where_the_module_rounds(backend, dtype, in_place):
    """Heads of ±1 and ±7 have a mean square of 25: quotients of a fifth, rounded, times the weight, rounded again."""
    rng = numbers("fifths")
    call = weights(make(15, (4, 2), 24, dtype=dtype, rotary_dim=16, sections=(2, 3, 3), key="fifths"))
    call = replace(call, norm_eps=0.0)
    for x in (call.q, call.k):
        sizes = torch.tensor([1.0, 7.0]).repeat(12)
        signs = torch.from_numpy(rng.integers(0, 2, tuple(x.shape))) * 2 - 1
        x.copy_(sizes[torch.from_numpy(rng.permuted(torch.arange(24).expand(x.shape).numpy(), axis=-1))] * signs)
    plain = replace(call.fresh(), q=module(call.q, call.q_norm, 0.0), k=module(call.k, call.k_norm, 0.0))
    plain = replace(plain, q_norm=None, k_norm=None)
    assert_same_bits(execute(call, backend, in_place), execute(plain, backend, in_place), "q")
    assert_same_bits(call.k_cache, plain.k_cache, "k_cache")
    assert_same_bits(call.v_cache, plain.v_cache, "v_cache")


@each_backend
@each_form
def test_skipped_slots_still_normalise_q(backend, in_place):
    call = weights(make(9, key="skipped"))
    call.slots[2], call.slots[5] = -1, 40
    whole = replace(call.fresh(), slots=torch.arange(9))
    assert_same_bits(execute(call, backend, in_place), execute(whole, backend, in_place))
    every = replace(weights(make(9, key="skipped")), slots=torch.full((9,), -1))
    execute(every, backend, in_place)
    assert every.k_cache.isnan().all() and every.v_cache.isnan().all()


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", ("NHD", "HND"))
def test_normalised_float8_caches(backend, dtype, layout):
    """What is stored is the rotation of the module's own heads, in float32, divided by the scale."""
    call = weights(make(23, (4, 2), 16, dtype=dtype, rotary_dim=8, key="float8"))
    scales = torch.tensor([0.02, 0.13]), torch.tensor(0.05)
    shape = (40, 2, 16) if layout == "NHD" else (2, 40, 16)
    caches = {name: torch.zeros(shape).to(FP8) for name in ("k_cache", "v_cache")}
    call = replace(call, layout=layout, k_scale=scales[0], v_scale=scales[1], **caches)
    call.run(backend)
    rows = call.k_cache if layout == "NHD" else call.k_cache.transpose(0, 1)
    found = rows.contiguous()[call.slots].double()
    want = (rotate(exact(call.k, call.k_norm), call) / scales[0].double()[:, None]).clamp(-448, 448)
    eager = rotate(module(call.k, call.k_norm), call, torch.float32) / scales[0][:, None]
    eager = eager.clamp(-448, 448).to(FP8).double()
    assert (found - want).abs().max() <= 2 * (eager - want).abs().max()


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", ("paged", "pages of a pool", "keys and values in one row", "head major keys"))
def test_normalised_cache_layouts(backend, dtype, layout):
    call = weights(base(dtype))
    plain = call.fresh()
    rotated = plain.run(backend)
    _, k_cache, v_cache = CACHES[layout](dtype)
    there = replace(call, k_cache=k_cache, v_cache=v_cache)
    assert_same_bits(there.run(backend), rotated)
    assert_same_bits(k_cache.reshape(40, 2, 16), plain.k_cache)
    assert_same_bits(v_cache.reshape(40, 2, 16), plain.v_cache)


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("gap", (0, 3))
def test_normalised_packed_projection(backend, dtype, in_place, gap):
    plain = weights(base(dtype))
    buffer, call = packed(base(dtype), gap)
    call, kept = weights(call), buffer.clone()
    rotated = execute(plain, backend, in_place)
    assert_same_bits(execute(call, backend, in_place).contiguous(), rotated)
    assert_same_bits(call.k_cache, plain.k_cache)
    columns = slice(gap, gap + 4 * 16)
    if in_place:
        kept[:, columns] = rotated.flatten(1)
    assert_same_bits(buffer, kept, "packed buffer")


@each_backend
@each_dtype
def test_extreme_heads(backend, dtype):
    """Zeros stay zero, heads of one large or tiny size come out as their signs, NaN stays in its own head."""
    call = replace(make(4, (2, 1), 16, dtype=dtype, positions=torch.zeros(3, 4, dtype=torch.int64)), norm_eps=1e-6)
    ones = torch.ones(16, dtype=dtype)
    call = replace(call, q_norm=ones, k_norm=ones)
    call.q[0], call.q[1], call.q[2, 0], call.q[3] = 0.0, 6e4, float("nan"), -300.0
    rotated = call.run(backend)
    near = torch.finfo(dtype).eps
    assert (rotated[0] == 0).all() and ((rotated[1] - 1).abs() <= near).all() and ((rotated[3] + 1).abs() <= near).all()
    assert rotated[2, 0].isnan().all() and rotated[2, 1].isfinite().all()


@each_backend
def test_zero_centred_weights_are_passed_plus_one(backend):
    call = make(5, key="zero centred")
    zero = normal(16, key="w", scale=0.2)
    given = replace(call.fresh(), q_norm=1 + zero, k_norm=1 + zero)
    want = replace(call.fresh(), q=module(call.q, 1 + zero), k=module(call.k, 1 + zero))
    torch.testing.assert_close(given.run(backend), want.run(backend), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.k_cache, want.k_cache, rtol=1e-5, atol=1e-5, equal_nan=True)


@each_backend
@each_dtype
def test_normalised_runs_repeat(backend, dtype):
    call = weights(make(29, (5, 5), 24, dtype=dtype, rotary_dim=16))
    again = call.fresh()
    assert_same_bits(call.run(backend), again.run(backend))
    assert_same_bits(call.k_cache, again.k_cache)


WEIGHT = torch.ones(16)
BAD = [
    # changes of a good call, error, what the message names
    ("type", {"q_norm": [1.0] * 16}, TypeError, ["q_norm", "list"]),
    ("dtype", {"q_norm": WEIGHT.bfloat16()}, TypeError, ["q_norm", "bfloat16", "float32"]),
    ("doubles", {"k_norm": WEIGHT.double()}, TypeError, ["k_norm", "float64", "float32"]),
    ("width", {"k_norm": torch.ones(15)}, ValueError, ["k_norm", "(15,)", "16"]),
    ("all heads at once", {"q_norm": torch.ones(4, 16)}, ValueError, ["q_norm", "(4, 16)", "1"]),
    ("stride", {"q_norm": torch.ones(32)[::2]}, ValueError, ["q_norm", "(2,)", "contiguous"]),
    ("device", {"k_norm": WEIGHT.to("meta")}, ValueError, ["k_norm", "meta", "cpu"]),
    ("gradient", {"q_norm": WEIGHT.clone().requires_grad_()}, ValueError, ["q_norm", "no_grad"]),
    ("negative eps", {"q_norm": WEIGHT, "norm_eps": -1e-6}, ValueError, ["norm_eps", "-1e-06"]),
    ("NaN eps", {"q_norm": WEIGHT, "norm_eps": float("nan")}, ValueError, ["norm_eps", "nan"]),
    ("infinite eps", {"q_norm": WEIGHT, "norm_eps": float("inf")}, ValueError, ["norm_eps", "inf"]),
    ("eps of words", {"k_norm": WEIGHT, "norm_eps": "small"}, TypeError, ["norm_eps", "str"]),
]


@each_backend
@each_form
@pytest.mark.parametrize("changes, error, named", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_norms(backend, in_place, changes, error, named):
    call = replace(make(6), **changes)
    before = call.fresh()
    with pytest.raises(error) as raised:
        execute(call, backend, in_place)
    assert all(text in str(raised.value) for text in named), raised.value
    for name in ("q", "k_cache", "v_cache"):
        assert_same_bits(getattr(call, name), getattr(before, name), name)


def test_module_weights_of_a_model_fit():
    """A q_norm as it stands in a model: its weight and its eps, under no_grad."""
    norm = Qwen3VLTextRMSNorm(16, 1e-5)
    call = make(3)
    with torch.no_grad():
        append_visual_kv_(
            *call.tensors(), call.sections, q_norm=norm.weight, k_norm=norm.weight, norm_eps=norm.variance_epsilon
        )
    assert call.q.isfinite().all()
