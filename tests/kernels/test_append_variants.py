"""Interleaved sections, head-major caches and float8 caches of `append_visual_kv`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, apply_rotary_pos_emb

from tests.helpers import assert_same_bits, assert_twice_as_good, each_backend, each_dtype, half_ulp, virtual_bytes
from tests.kernels.append_checks import each_form, execute
from tests.kernels.append_inputs import Call, make, mrope, rotate
from tests.kernels.cache_layouts import CACHES, CAPACITY, DIM, TOKENS
from vpt_kernels import append_visual_kv

FP8 = torch.float8_e4m3fn


@each_backend
@each_dtype
@pytest.mark.parametrize("sections", ((24, 20, 20), (22, 21, 21), (64, 0, 0), (44, 20, 0)))
def test_interleaved_sections(backend, dtype, sections):
    call = replace(make(23, (4, 2), 128, dtype=dtype, sections=sections), interleaved=True)
    before = call.fresh()
    rotated = call.run(backend)
    assert_twice_as_good(rotated, rotate(before.q, before, dtype), rotate(before.q, before), "q")
    k_rows = call.k_cache[call.slots]
    assert_twice_as_good(k_rows, rotate(before.k, before, dtype), rotate(before.k, before), "k")
    assert_same_bits(call.v_cache[call.slots], before.v)
    in_place = before.fresh()
    in_place.run_in_place(backend)
    assert_same_bits(in_place.q, rotated)


@each_backend
@each_dtype
def test_interleaved_equals_transformers(backend, dtype):
    config = Qwen3VLTextConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20]},
    )
    positions = mrope(9, (6, 4), 5, start=300)
    call = make(positions.shape[1], (2, 1), 128, dtype=dtype, sections=(24, 20, 20), positions=positions)
    call = replace(call, interleaved=True)
    cos, sin = Qwen3VLTextRotaryEmbedding(config)(call.q, positions[:, None])
    q, k = apply_rotary_pos_emb(call.q.transpose(0, 1)[None], call.k.transpose(0, 1)[None], cos, sin)
    rotated = call.run(backend)
    assert_twice_as_good(rotated, q[0].transpose(0, 1).contiguous(), rotate(call.q, call))
    assert_twice_as_good(call.k_cache[call.slots], k[0].transpose(0, 1).contiguous(), rotate(call.k, call))


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("name", CACHES)
def test_head_major_caches(backend, dtype, in_place, name):
    """The same storages, named [heads, rows, dim] and written through "HND": the same bytes."""
    base = make(TOKENS, (4, 2), DIM, dtype=dtype, capacity=CAPACITY)
    base.slots[3], base.slots[11] = -1, CAPACITY
    results = []
    for layout in ("NHD", "HND"):
        storages, k_cache, v_cache = CACHES[name](dtype)
        if layout == "HND":
            k_cache, v_cache = k_cache.transpose(-3, -2), v_cache.transpose(-3, -2)
        call = replace(base.fresh(), k_cache=k_cache, v_cache=v_cache, layout=layout)
        results.append([execute(call, backend, in_place), *storages])
    for nhd, hnd in zip(*results, strict=True):
        assert_same_bits(hnd, nhd)


@each_backend
def test_head_major_skips_and_empty(backend):
    call = replace(make(4), layout="HND", k_cache=torch.full((2, 40, 16), float("nan")), v_cache=torch.zeros(2, 40, 16))
    call = replace(call, slots=torch.tensor([-1, 40, 79, 1 << 33]))
    before = call.fresh()
    call.run(backend)
    assert_same_bits(call.k_cache, before.k_cache)
    assert_same_bits(call.v_cache, before.v_cache)
    for shape in ((2, 0, 16), (0, 2, 5, 16), (3, 2, 0, 16)):
        empty = torch.empty(shape)
        replace(make(4), layout="HND", k_cache=empty, v_cache=empty.clone()).run(backend)


def quantised(
    tokens: int, dtype: torch.dtype, k_scale: Tensor, v_scale: Tensor, scale: float = 1.0, head_dim: int = 16
) -> Call:
    call = make(tokens, dtype=dtype, capacity=tokens + 3, rotary_dim=8, head_dim=head_dim)
    caches = {name: torch.full((tokens + 3, 2, head_dim), -3.5).to(FP8) for name in ("k_cache", "v_cache")}
    return replace(call, k=call.k * scale, v=call.v * scale, k_scale=k_scale, v_scale=v_scale, **caches)


def check_stored(rows: Tensor, exact: Tensor, arithmetic: Tensor) -> None:
    """float8 rows of the exact float64 values: nearest, up to float32 arithmetic on terms of that size; saturated."""
    assert rows.dtype == FP8
    value, clamped = rows.double(), exact.clamp(-448, 448)
    assert value.isfinite().all()
    assert ((value - clamped).abs() <= half_ulp(clamped, FP8) + arithmetic * 2**-22).all()


SCALES = {
    "one": (1.0, 1.0),
    "apart": (0.37, 5.3),
    "small": (0.004, 0.0021),
    "large": (900.0, 77.0),
    "per head": ([0.31, 2.9], [0.05, 11.0]),
    "per head and one": ([0.31, 2.9], [7.7]),
}


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_float8_caches(backend, dtype, in_place, scales):
    """Quotients are rounded once, straight from float32, to nearest, and saturate; the rotated q is not scaled."""
    k_scale, v_scale = (torch.tensor(value, dtype=torch.float32) for value in scales)
    call = quantised(61, dtype, k_scale, v_scale)
    plain = make(61, dtype=dtype, capacity=64, rotary_dim=8)
    canaries = torch.ones(64, dtype=torch.bool)
    canaries[call.slots] = False
    assert_same_bits(execute(call, backend, in_place), execute(plain.fresh(), backend, in_place))
    for cache, x, scale in ((call.k_cache, rotate(plain.k, plain), k_scale), (call.v_cache, plain.v.double(), v_scale)):
        wide = scale.double().reshape(-1, 1)
        largest = x.abs().amax(-1, keepdim=True) / wide
        check_stored(cache[call.slots], x / wide, largest)
        assert (cache[canaries].float() == -3.5).all()


@each_backend
@each_dtype
def test_float8_values_are_nearest_even(backend, dtype):
    """Every float8 number, the midpoints between neighbours and what lies beside them, under scales that are exact."""
    finite = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    finite = finite[finite.isfinite()].unique()
    middle = (finite[1:] + finite[:-1]) / 2
    beside = torch.cat([middle * (1 + 2**-7), middle * (1 - 2**-7)])
    values = torch.cat([finite, middle, beside, torch.tensor([464.0, 465.0, 500.0, 6e4, -464.0, -0.0])]).to(dtype)
    values = values[values.isfinite()]
    values = values[: len(values) // 32 * 32].view(-1, 2, 16)
    for scale in (1.0, 0.25, 8.0):
        scaled = (values.float() * scale).to(dtype)
        exact = (scaled.float() / scale).clamp(-448, 448)
        call = quantised(len(values), dtype, torch.tensor(1.0), torch.tensor(scale))
        call = replace(call, v=scaled)
        call.run(backend)
        assert_same_bits(call.v_cache[call.slots].view(torch.uint8), exact.to(FP8).view(torch.uint8))


@each_backend
@each_dtype
def test_float8_saturates_and_keeps_nan(backend, dtype):
    call = quantised(6, dtype, torch.tensor(0.5), torch.tensor(0.25))
    call.v[0], call.v[1], call.v[2] = float("inf"), float("-inf"), float("nan")
    call.v[3], call.v[4] = 120.0, -3e4
    call.k[..., 8:] = call.v[..., 8:]
    call.run(backend)
    for cache, part in ((call.v_cache, slice(None)), (call.k_cache, slice(8, None))):
        rows = cache[call.slots].float()[..., part]
        assert (rows[0] == 448).all() and (rows[1] == -448).all() and rows[2].isnan().all() and (rows[4] == -448).all()
        assert rows[5].isfinite().all()
    assert (call.v_cache[call.slots[3]].float() == 448).all() and (
        call.k_cache[call.slots[3]].float()[..., 8:] == 240
    ).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", ("NHD", "HND"))
def test_float8_pages_and_strides(backend, dtype, layout):
    """Every layout of the caches holds the bytes of the plain one."""
    scales = torch.tensor([0.3, 0.7]), torch.tensor([1.1, 0.2])
    plain = quantised(TOKENS, dtype, *scales)
    plain = replace(plain, **{n: torch.zeros(CAPACITY, 2, DIM).to(FP8) for n in ("k_cache", "v_cache")})
    plain.slots[2] = -1
    blank = plain.fresh()
    plain.run(backend)
    for name in CACHES:
        _, k_cache, v_cache = CACHES[name](torch.float32)
        caches = []
        for cache in (k_cache, v_cache):
            fresh = torch.zeros(cache.untyped_storage().nbytes() // 4).to(FP8)
            view = fresh.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            caches.append(view if layout == "NHD" else view.transpose(-3, -2))
        replace(blank.fresh(), k_cache=caches[0], v_cache=caches[1], layout=layout).run(backend)
        for cache, want in zip(caches, (plain.k_cache, plain.v_cache), strict=True):
            rows = cache if layout == "NHD" else cache.transpose(-3, -2)
            actual = rows.reshape(CAPACITY, 2, DIM).view(torch.uint8)
            assert_same_bits(actual, want.view(torch.uint8), f"{name} {layout}")


@each_backend
def test_float8_rows_beyond_32_bits(backend):
    row = (1 << 31) + 64
    plain = quantised(2, torch.bfloat16, torch.tensor(0.5), torch.tensor(0.5))
    storage = virtual_bytes(4 * row).view(FP8)
    k_cache = storage.as_strided((5, 2, 16), (row // 2, 16, 1))
    k_cache.copy_(plain.k_cache)
    call = replace(plain.fresh(), k_cache=k_cache)
    call.run(backend)
    plain.run(backend)
    assert_same_bits(k_cache.contiguous().view(torch.uint8), plain.k_cache.view(torch.uint8))


def bad(**changes) -> Call:
    return replace(quantised(5, torch.float32, torch.tensor([0.5, 0.5]), torch.tensor(0.5)), **changes)


def unscaled(**changes) -> Call:
    return replace(make(5, capacity=8), **changes)


SCALE = torch.tensor(0.5)
BAD = [
    ("no key scale", bad(k_scale=None), ValueError, ["k_scale", "missing"]),
    ("no value scale", bad(v_scale=None), ValueError, ["v_scale", "missing"]),
    ("scale without float8", unscaled(k_scale=SCALE, v_scale=SCALE), ValueError, ["k_scale", "float8_e4m3fn"]),
    ("one scale without float8", unscaled(v_scale=SCALE), ValueError, ["v_scale", "float8_e4m3fn"]),
    ("scale dtype", bad(k_scale=SCALE.double()), TypeError, ["k_scale", "float64", "float32"]),
    ("scale number", bad(k_scale=0.5), TypeError, ["k_scale", "float"]),
    ("scale count", bad(v_scale=torch.ones(3)), ValueError, ["v_scale", "(3,)", "2"]),
    ("scale per query head", bad(k_scale=torch.ones(4)), ValueError, ["k_scale", "(4,)", "2"]),
    ("scale rank", bad(k_scale=torch.ones(1, 2)), ValueError, ["k_scale", "(1, 2)"]),
    ("scale device", bad(k_scale=SCALE.to("meta")), ValueError, ["k_scale", "meta", "cpu"]),
    ("one float8 cache", bad(v_cache=torch.zeros(8, 2, 16)), TypeError, ["v_cache", "float32", "float8_e4m3fn"]),
    ("other float8 cache", unscaled(v_cache=torch.zeros(8, 2, 16).to(FP8)), TypeError, ["v_cache", "float8_e4m3fn"]),
    ("other float8", bad(k_cache=torch.zeros(8, 2, 16).to(torch.float8_e5m2)), TypeError, ["k_cache", "float8_e5m2"]),
    ("layout", unscaled(layout="NDH"), ValueError, ["NDH", "NHD", "HND"]),
    ("rows as heads", unscaled(layout="HND"), ValueError, ["(8, 2, 16)", "HND", "2"]),
    (
        "pages as heads",
        unscaled(layout="HND", k_cache=torch.zeros(4, 3, 2, 16), v_cache=torch.zeros(4, 3, 2, 16)),
        ValueError,
        ["(4, 3, 2, 16)", "HND"],
    ),
]


@each_backend
@each_form
@pytest.mark.parametrize("call, error, named", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(backend, in_place, call, error, named):
    before = call.fresh()
    with pytest.raises(error) as raised:
        execute(call, backend, in_place)
    for text in named:
        assert text in str(raised.value)
    for name in ("q", "k_cache", "v_cache"):
        assert_same_bits(getattr(call, name), getattr(before, name), name)


@each_backend
def test_options_have_plain_defaults(backend):
    call = make(5)
    other = call.fresh()
    other.run(backend)
    append_visual_kv(*call.tensors(), call.sections, backend=backend)
    assert_same_bits(call.k_cache, other.k_cache)
