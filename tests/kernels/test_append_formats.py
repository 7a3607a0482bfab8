"""Exact bits of `append_visual_kv`: float8 quotients, rotations that float32 holds exactly, layouts that look alike."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from tests.helpers import assert_same_bits, each_backend, each_dtype, normal, numbers
from tests.kernels.append_checks import each_form, execute, wrapping
from tests.kernels.append_inputs import Call, make, rotate, stored

FP8 = torch.float8_e4m3fn
TOKENS, HEADS, DIM, CAPACITY = 11, (6, 3), 24, 30
CANARY = 0x55  # a byte that no layout below writes by chance to every element of a row

LAYOUTS = {
    # layout, shape of the storage, the cache as a view of it that has room around every row
    "rows": ("NHD", (CAPACITY + 4, 5, DIM + 6), lambda s: s[2:-2, 1:4, 3:-3]),
    "pages": ("NHD", (8, 7, 5, DIM + 6), lambda s: s[1:-1, 1:6, 1:4, 3:-3]),
    "heads": ("HND", (5, CAPACITY + 4, DIM + 6), lambda s: s[1:4, 2:-2, 3:-3]),
    "pages of heads": ("HND", (8, 5, 7, DIM + 6), lambda s: s[1:-1, 1:4, 1:6, 3:-3]),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)

SCALES = {
    "one": (torch.tensor(0.037), torch.tensor([3.3])),
    "heads": (normal(3, key="ks").exp() / 9, torch.ones(3) / 3),
}
each_scale = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)


def in_rows(cache: Tensor, layout: str) -> Tensor:
    """[capacity, heads, dim] in order of slots."""
    cache = cache if layout == "NHD" else cache.transpose(-3, -2)
    return cache.reshape(-1, *cache.shape[-2:])


def exact(dtype: torch.dtype) -> Call:
    """Small integers rotated by 64ths: products and sums that float32 holds, so every order of operations agrees."""
    rng = numbers("exact", str(dtype))
    call = make(TOKENS, HEADS, DIM, dtype=dtype, rotary_dim=16, sections=(2, 3, 3), capacity=CAPACITY, table_rows=40)
    for x in (call.q, call.k):
        x.copy_(torch.from_numpy(rng.integers(-120, 121, tuple(x.shape))))
    table = torch.from_numpy(rng.integers(-64, 65, tuple(call.cos_sin.shape))) / 64
    call.slots[1], call.slots[4], call.slots[7] = -1, CAPACITY, CAPACITY + 1
    return replace(call, cos_sin=table.float(), positions=call.positions % 40)


def storage_of(layout: str, extra: int, dtype: torch.dtype) -> Tensor:
    """Rows `extra` elements longer than the layout's, full of canaries."""
    shape = LAYOUTS[layout][1]
    return torch.full((*shape[:-1], (shape[-1] + extra) * dtype.itemsize), CANARY, dtype=torch.uint8).view(dtype)


def cache_in(storage: Tensor, layout: str) -> Tensor:
    _, shape, view = LAYOUTS[layout]
    return view(storage[..., : shape[-1]])


def placed(call: Call, layout: str, dtype: torch.dtype) -> tuple[list[Tensor], Call]:
    """The storages, whose strides differ, and the call on caches inside them."""
    storages = [storage_of(layout, extra, dtype) for extra in (0, 4)]
    k_cache, v_cache = (cache_in(storage, layout) for storage in storages)
    return storages, replace(call, layout=LAYOUTS[layout][0], k_cache=k_cache, v_cache=v_cache)


def check_stored(call: Call, storages: list[Tensor], layout: str, *wanted: Tensor) -> None:
    """The caches hold the wanted rows [tokens, heads, dim] at their slots; every other byte is the canary."""
    for storage, want, extra in zip(storages, wanted, (0, 4), strict=True):
        expected = storage_of(layout, extra, want.dtype)
        target = cache_in(expected, layout)
        target = target if call.layout == "NHD" else target.transpose(-3, -2)
        for token, slot in stored(call.slots, CAPACITY):
            row = target[slot] if target.dim() == 3 else target[slot // 5, slot % 5]
            row.view(torch.uint8).copy_(want[token].contiguous().view(torch.uint8))
        assert_same_bits(storage.view(torch.uint8), expected.view(torch.uint8), layout)


def float8(x: Tensor, scale: Tensor) -> Tensor:
    """torch's own conversion of the clamped float32 quotient."""
    return (x.float() / scale.reshape(-1, 1)).clamp(-448, 448).to(FP8)


@each_backend
@each_dtype
@each_form
@each_layout
def test_exact_rotation(backend, dtype, in_place, layout):
    """Rounded once to nearest even: bit by bit what float64 gives, with nothing around the rows touched."""
    call = exact(dtype)
    want_q, want_k = rotate(call.q, call).to(dtype), rotate(call.k, call).to(dtype)
    assert (want_k.double() != rotate(call.k, call)).any() == (dtype != torch.float32)
    storages, call = placed(call, layout, dtype)
    assert_same_bits(execute(call, backend, in_place), want_q)
    check_stored(call, storages, layout, want_k, call.v)


@each_backend
@each_dtype
@each_form
@each_layout
@each_scale
def test_float8_is_torch_conversion_of_the_quotient(backend, dtype, in_place, layout, scales):
    """k: the rotation in float32, not rounded to the input's dtype before; v: the input; each divided, then rounded."""
    call = exact(dtype)
    call.v.mul_(40)
    call.v[2, 0], call.v[3, 1], call.v[5, 2] = float("nan"), float("inf"), 6e4
    call.k[8, 1, 16:], call.k[9, 1, 16:] = float("nan"), float("-inf")
    wide = rotate(call.k, call)
    assert_same_bits(wide.float().double().nan_to_num(), wide.nan_to_num(), "rotation in float32")
    call = replace(call, k_scale=scales[0], v_scale=scales[1])
    want_k, want_v = float8(wide, scales[0]), float8(call.v, scales[1])
    assert want_v[2, 0].float().isnan().all() and (want_v[3, 1].float() == 448).all()
    assert (want_v.float().abs() == 448).any() and (want_k.float().abs() < 448).any()
    want_q = rotate(call.q, call).to(dtype)
    storages, call = placed(call, layout, FP8)
    assert_same_bits(execute(call, backend, in_place), want_q)
    check_stored(call, storages, layout, want_k, want_v)


@each_backend
@each_dtype
def test_float8_quotients_of_any_scale(backend, dtype):
    """A division, not a product with the reciprocal: one in thousands of quotients tells them apart."""
    call = make(200, (4, 4), 64, dtype=dtype, capacity=200)
    scale = torch.tensor([0.3, 0.7, 1.1, 0.013])
    values = (torch.arange(448) + 0.5)[None, :] * 2.0 ** torch.arange(-4, 3)[:, None]
    ties = torch.cat([values.flatten(), -values.flatten()])
    index = torch.from_numpy(numbers("ties").integers(0, len(ties), (200, 4, 64)))
    v = (ties[index] * scale[:, None]).to(dtype)
    caches = {name: torch.zeros(200, 4, 64).to(FP8) for name in ("k_cache", "v_cache")}
    call = replace(call, v=v, k_scale=torch.tensor(1.0), v_scale=scale, **caches)
    call.run(backend)
    want = float8(v, scale)
    assert_same_bits(call.v_cache[call.slots].view(torch.uint8), want.view(torch.uint8))


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("gaps", ((0, 2, 7), (5, 0, 3), (1, 9, 0)))
def test_inputs_with_strides_of_their_own(backend, dtype, in_place, gaps):
    """q, k and v each with another token stride and head stride."""
    plain = make(TOKENS, HEADS, DIM, dtype=dtype, capacity=CAPACITY)
    views = {}
    for name, gap in zip("qkv", gaps, strict=True):
        x = getattr(plain, name)
        wide = torch.full((TOKENS, x.shape[1] + gap, DIM + 2 * gap), float("nan"), dtype=dtype)
        views[name] = wide[:, gap // 2 : gap // 2 + x.shape[1], gap : gap + DIM].copy_(x)
    assert len({view.stride() for view in views.values()}) == 3
    call = replace(plain.fresh(), **views)
    assert_same_bits(execute(call, backend, in_place).contiguous(), execute(plain, backend, in_place))
    assert_same_bits(call.k_cache, plain.k_cache)
    assert_same_bits(call.v_cache, plain.v_cache)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", ((3, 3, DIM), (4, 3, 3, DIM)), ids=("rows", "pages"))
def test_the_layout_decides_not_the_shape(backend, dtype, shape):
    """As many rows as heads: only the name tells them apart."""
    capacity = 3 if len(shape) == 3 else 12
    call = make(2, HEADS, DIM, dtype=dtype, capacity=capacity)
    call = replace(call, slots=torch.tensor([capacity - 1, 0]))
    rows = {}
    for layout in ("NHD", "HND"):
        caches = {name: torch.zeros(shape, dtype=dtype) for name in ("k_cache", "v_cache")}
        other = replace(call.fresh(), layout=layout, **caches)
        other.run(backend)
        rows[layout] = (in_rows(other.k_cache, layout), in_rows(other.v_cache, layout))
    for nhd, hnd in zip(*rows.values(), strict=True):
        assert_same_bits(hnd, nhd)
        assert nhd[1:-1].eq(0).all()
    assert_same_bits(rows["HND"][1][[capacity - 1, 0]], call.v)


@each_backend
@each_form
@pytest.mark.parametrize("layout", ("NHD", "HND"))
@pytest.mark.parametrize("axis", (0, 1, 2), ids=("page", "row or head", "head or row"))
def test_caches_that_wrap_at_32_bits(backend, in_place, layout, axis):
    call = make(4, HEADS, 8, capacity=4, sections=(1, 1, 2))
    shape = (2, 2, 3, 8) if layout == "NHD" else (2, 3, 2, 8)
    plain = replace(call, layout=layout, k_cache=torch.zeros(shape), v_cache=torch.zeros(shape))
    far = replace(plain.fresh(), k_cache=wrapping(plain.k_cache, axis), v_cache=wrapping(plain.v_cache, axis))
    assert_same_bits(execute(far, backend, in_place), execute(plain, backend, in_place))
    assert_same_bits(far.k_cache.contiguous(), plain.k_cache)
    assert_same_bits(far.v_cache.contiguous(), plain.v_cache)


@each_backend
@each_form
@pytest.mark.parametrize("axis", (0, 1), ids=("token", "head"))
@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_inputs_that_wrap_at_32_bits(backend, in_place, axis, name):
    plain = make(3, HEADS, 8, capacity=4, sections=(1, 1, 2))
    call = replace(plain.fresh(), **{name: wrapping(getattr(plain, name), axis)})
    check_equal(call, plain, backend, in_place)


@each_backend
@each_form
@pytest.mark.parametrize("axis", (0, 1), ids=("token", "head"))
@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_inputs_of_float8_caches_that_wrap_at_32_bits(backend, in_place, axis, name):
    caches = {cache: torch.zeros(4, 3, 8, dtype=torch.float8_e4m3fn) for cache in ("k_cache", "v_cache")}
    scales = {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(0.25)}
    plain = replace(make(3, HEADS, 8, capacity=4, sections=(1, 1, 2)), **caches, **scales)
    call = replace(plain.fresh(), **{name: wrapping(getattr(plain, name), axis)})
    check_equal(call, plain, backend, in_place)


def check_equal(call: Call, plain: Call, backend: str, in_place: bool) -> None:
    assert_same_bits(execute(call, backend, in_place).contiguous(), execute(plain, backend, in_place))
    assert_same_bits(call.k_cache, plain.k_cache)
    assert_same_bits(call.v_cache, plain.v_cache)


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("sections", ((24, 20, 20), (4, 3, 1), (3, 1, 4), (1, 5, 2), (2, 0, 6), (8, 0, 0)))
def test_interleaved_axes_are_transformers(backend, dtype, in_place, sections):
    """Which position rotates which half-dimension, asked of Qwen3-VL's own rotary embedding."""
    half = sum(sections)
    rows = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, half).clone()
    rotary = SimpleNamespace(mrope_section=sections)
    axes = Qwen3VLTextRotaryEmbedding.recomposition_frequencies(rotary, rows)[0, 0, :half].long()
    call = make(1, (1, 1), 2 * half + 4, dtype=dtype, rotary_dim=2 * half, sections=sections, capacity=1)
    table = torch.arange(96 * half).view(3, 32 * half)[:, : 2 * half] % 64 + 64.0 * torch.arange(3)[:, None]
    call = replace(call, cos_sin=table, positions=torch.tensor([[0], [1], [2]]), interleaved=True)
    call.q[:], call.k[:] = 0, 0
    call.q[..., :half], call.k[..., half : 2 * half] = 1, 1
    rotated = execute(call, backend, in_place)[0, 0]
    cos, sin = table[axes, torch.arange(half)].to(dtype), table[axes, half + torch.arange(half)].to(dtype)
    assert rotated[:half].tolist() == cos.tolist() and rotated[half : 2 * half].tolist() == sin.tolist()
    stored_k = call.k_cache[call.slots[0], 0]
    assert stored_k[:half].tolist() == (-sin).tolist() and stored_k[half : 2 * half].tolist() == cos.tolist()
    assert not rotated[2 * half :].any() and not stored_k[2 * half :].any()


@each_backend
@each_form
@pytest.mark.parametrize("name", ("k_scale", "v_scale"))
@pytest.mark.parametrize(
    "change, error, named",
    [
        (lambda s: s.half(), TypeError, ["float16", "float32"]),
        (lambda s: s.tolist(), TypeError, ["list"]),
        (lambda s: s[:2], ValueError, ["(2,)", "3"]),
        (lambda s: s[:0], ValueError, ["(0,)", "3"]),
        (lambda s: s[:, None], ValueError, ["(3, 1)", "3"]),
        (lambda s: s.repeat_interleave(2)[::2], ValueError, ["contiguous"]),
        (lambda s: None, ValueError, ["missing"]),
    ],
    ids=("dtype", "list", "too few", "none of them", "rank", "stride", "missing"),
)
def test_bad_scales(backend, in_place, name, change, error, named):
    call = replace(exact(torch.float32), k_scale=torch.ones(3), v_scale=torch.ones(3))
    storages, call = placed(call, "heads", FP8)
    call = replace(call, **{name: change(getattr(call, name))})
    before = [t.clone() for t in (call.q, *storages)]
    with pytest.raises(error) as raised:
        execute(call, backend, in_place)
    for text in (name, *named):
        assert text in str(raised.value)
    for tensor, want in zip((call.q, *storages), before, strict=True):
        assert_same_bits(tensor.view(torch.uint8), want.view(torch.uint8))
