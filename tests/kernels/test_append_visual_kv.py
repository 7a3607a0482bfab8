"""Rotation and append against a float64 oracle; what is stored, what is skipped, what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, apply_rotary_pos_emb

from tests.helpers import assert_same_bits, assert_twice_as_good, each_backend, each_dtype, half_ulp
from tests.kernels.append_checks import check
from tests.kernels.append_inputs import angles, make, mrope, rotate
from vpt_kernels import append_visual_kv, rotary_table

each_index = pytest.mark.parametrize("index", (torch.int32, torch.int64), ids=("int32", "int64"))
SHAPES = {
    "2b": {"tokens": 283, "heads": (12, 2), "head_dim": 128, "sections": (16, 24, 24), "capacity": 300},
    "7b": {"tokens": 70, "heads": (28, 4), "head_dim": 128, "sections": (16, 24, 24), "capacity": 80},
    "one token": {"tokens": 1, "heads": (12, 2), "head_dim": 128, "sections": (16, 24, 24)},
    "partial rotary": {"tokens": 37, "heads": (6, 3), "head_dim": 80, "rotary_dim": 32},
    "one pair": {"tokens": 11, "heads": (2, 1), "head_dim": 2, "sections": (0, 0, 1)},
    "odd head": {"tokens": 13, "heads": (3, 3), "head_dim": 23, "rotary_dim": 14, "sections": (1, 2, 4)},
    "odd half": {"tokens": 17, "heads": (5, 1), "head_dim": 54, "sections": (7, 9, 11)},
    "one axis": {"tokens": 8, "heads": (2, 2), "head_dim": 16, "sections": (0, 8, 0)},
    "two axes": {"tokens": 8, "heads": (2, 2), "head_dim": 16, "sections": (3, 0, 5)},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@each_backend
@each_dtype
@each_shape
def test_random_positions(backend, dtype, shape):
    check(make(dtype=dtype, **shape), backend)


@each_backend
@each_dtype
def test_image_between_text(backend, dtype):
    """The positions of a prompt: text, an image of 14×18 tokens on its grid, text that goes on at 15 + 18."""
    positions = mrope(15, (14, 18), 16)
    assert positions[:, 14 + 252 + 1].tolist() == [33, 33, 33] and positions[:, 266].tolist() == [15, 28, 32]
    shape = {"heads": (12, 2), "head_dim": 128, "sections": (16, 24, 24), "capacity": 300}
    check(make(positions.shape[1], dtype=dtype, positions=positions, **shape), backend)


@each_backend
@each_shape
def test_rotation_is_rounded_once(backend, shape):
    """Closer to the exact value than half a unit in the last place, up to float32 arithmetic."""
    call = make(dtype=torch.bfloat16, **shape)
    rotated, exact = call.run(backend).double(), rotate(call.q, call)
    half = call.cos_sin.shape[1] // 2
    cos, sin = (t.double().abs().repeat(1, 1, 2) for t in angles(call))
    q = call.q.double().abs()[..., : 2 * half]
    terms = torch.zeros_like(exact)
    terms[..., : 2 * half] = q * cos + q.roll(half, -1) * sin
    assert ((rotated - exact).abs() <= half_ulp(exact, torch.bfloat16) + terms * 2**-23).all()


@each_backend
@pytest.mark.parametrize("tokens", (0, 1, 2, 3, 5, 7, 13, 31, 127, 509))
def test_token_counts(backend, tokens):
    check(make(tokens, capacity=tokens + 3), backend)


@each_backend
@each_index
@pytest.mark.parametrize("slot_index", (torch.int32, torch.int64), ids=("slots32", "slots64"))
def test_index_dtypes(backend, index, slot_index):
    call = make(9)
    want, wanted = call.fresh(), call.fresh()
    rotated = want.run(backend)
    wanted = replace(wanted, positions=call.positions.to(index), slots=call.slots.to(slot_index))
    assert_same_bits(wanted.run(backend), rotated)
    assert_same_bits(wanted.k_cache, want.k_cache)


@each_backend
@each_dtype
@pytest.mark.parametrize("paged", (False, True))
def test_skipped_slots(backend, dtype, paged):
    """−1, ≥ capacity, and what would be valid if it were cut to 32 bits: q is rotated, nothing is stored."""
    call = make(12, dtype=dtype, capacity=40)
    slots = [-1, 3, 40, 41, 39, 1 << 32, -(1 << 32), (1 << 32) + 5, 0, 1 << 62, -(1 << 63), (1 << 63) - 1]
    call = replace(call, slots=torch.tensor(slots))
    if paged:
        call = replace(call, **{name: getattr(call, name).view(8, 5, 2, 16) for name in ("k_cache", "v_cache")})
    check(call, backend)
    assert (~call.v_cache.reshape(40, -1).isnan().all(1)).nonzero().flatten().tolist() == [0, 3, 39]
    narrow = torch.tensor([-1, 40, -(1 << 31), (1 << 31) - 1] * 3, dtype=torch.int32)
    check(replace(make(12, dtype=dtype, capacity=40), slots=narrow), backend)


@each_backend
def test_every_slot_skipped(backend):
    call = replace(make(4), slots=torch.full((4,), -1))
    check(call, backend)
    assert call.k_cache.isnan().all()
    for shape in ((0, 2, 16), (0, 5, 2, 16), (3, 0, 2, 16)):
        empty = torch.empty(shape)
        check(replace(make(4), k_cache=empty, v_cache=empty.clone()), backend)


@each_backend
def test_a_skipped_nan_leaves_no_trace(backend):
    call = make(6)
    for name in ("q", "k", "v"):
        getattr(call, name)[2] = float("nan")
    call.slots[2] = -1
    rotated = call.run(backend)
    assert rotated[2].isnan().all() and rotated[[0, 1, 3, 4, 5]].isfinite().all()
    kept = torch.zeros(40, dtype=torch.bool)
    kept[call.slots[[0, 1, 3, 4, 5]]] = True
    for cache in (call.k_cache, call.v_cache):
        assert cache[kept].isfinite().all() and cache[~kept].isnan().all()


@each_backend
def test_nan_query_does_not_touch_the_caches(backend):
    call = make(6)
    want = call.fresh()
    want.run(backend)
    call.q[:] = float("nan")
    call.run(backend)
    assert_same_bits(call.k_cache, want.k_cache)
    assert_same_bits(call.v_cache, want.v_cache)


@each_backend
@each_dtype
def test_values_are_copied_bit_by_bit(backend, dtype):
    """NaN payloads, −0 and denormals survive in v and in the dimensions beyond the rotary ones."""
    call = make(8, head_dim=24, rotary_dim=8, dtype=dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    odd = torch.tensor([1, -1, 0x7F81, 0x7C01, torch.iinfo(integers).min, 0x0080, 0x7FC1, -2], dtype=integers).view(
        dtype
    )
    call.v[:] = odd[:, None, None]
    call.k[..., 8:] = odd[:, None, None]
    before = call.k.clone()
    call.run(backend)
    assert_same_bits(call.v_cache[call.slots], call.v)
    assert_same_bits(call.k_cache[call.slots][..., 8:], before[..., 8:])


@each_backend
def test_equal_slots_store_one_of_the_tokens(backend):
    call = replace(make(64), slots=torch.full((64,), 7))
    call.run(backend)
    rotated = replace(make(64, capacity=64), slots=torch.arange(64))
    rotated.run(backend)
    for cache, candidates in ((call.k_cache, rotated.k_cache), (call.v_cache, rotated.v_cache)):
        assert (cache[7] == candidates).any(0).all()
        assert cache[:7].isnan().all() and cache[8:].isnan().all()


@each_backend
@each_dtype
def test_slot_and_position_are_separate(backend, dtype):
    """Neither moves with the other: the stored k of one token, at many slots and positions."""
    for slot, position in ((0, 0), (39, 1), (1, 39), (5, 4095), (20, 7)):
        call = make(1, dtype=dtype)
        call.slots[:] = slot
        call.positions[:] = torch.tensor([[position], [position // 2], [position // 3]])
        check(call, backend)
        assert call.k_cache[slot].isfinite().all()


@each_backend
@each_dtype
def test_runs_repeat(backend, dtype):
    call = make(33, dtype=dtype)
    again = call.fresh()
    assert_same_bits(call.run(backend), again.run(backend))
    assert_same_bits(call.k_cache, again.k_cache)
    assert_same_bits(call.v_cache, again.v_cache)


@each_backend
def test_appends_continue(backend):
    """One chunk or three: the same cache."""
    call = make(30, positions=mrope(4, (4, 5), 6))
    parts = call.fresh()
    rotated = call.run(backend)
    pieces = []
    for span in (slice(0, 7), slice(7, 8), slice(8, 30)):
        part = replace(parts, q=call.q[span], k=call.k[span], v=call.v[span], slots=call.slots[span])
        pieces.append(replace(part, positions=call.positions[:, span]).run(backend))
    assert_same_bits(torch.cat(pieces), rotated)
    assert_same_bits(parts.k_cache, call.k_cache)
    assert_same_bits(parts.v_cache, call.v_cache)


def text_config(head_dim: int = 128) -> Qwen2VLTextConfig:
    return Qwen2VLTextConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )


def test_rotary_table_is_transformers():
    rotary = Qwen2VLRotaryEmbedding(text_config())
    rows = torch.arange(5000)
    cos, sin = rotary(torch.zeros(1), rows.expand(3, 1, -1))
    table = rotary_table(5000, 128)
    assert table.shape == (5000, 128) and table.dtype == torch.float32
    torch.testing.assert_close(table, torch.cat([cos[0, :, :64], sin[0, :, :64]], -1), rtol=0, atol=2**-23)
    exact = rows.double()[:, None] * (1 / 1e6 ** (torch.arange(0, 128, 2) / 128).double())
    theirs = (cos[0, :, :64].double() - exact.cos()).abs().max()
    assert (table[:, :64].double() - exact.cos()).abs().max() <= 2 * theirs


def test_rotary_table_of_one_position_and_other_theta():
    assert rotary_table(1, 2).tolist() == [[1.0, 0.0]]
    table = rotary_table(3, 4, theta=100.0)
    want = torch.tensor(
        [[1.0, 1, 0, 0]]
        + [[f(a) for f in (torch.cos, torch.sin) for a in (t, t / 10)] for t in (torch.tensor(1.0), torch.tensor(2.0))]
    )
    torch.testing.assert_close(table, want)


@each_backend
@each_dtype
def test_equals_transformers(backend, dtype):
    """Its rotary embedding and rotation as they are, on an image between text."""
    positions = mrope(9, (6, 4), 5, start=300)
    tokens = positions.shape[1]
    call = make(tokens, (2, 1), 128, dtype=dtype, sections=(16, 24, 24), positions=positions)
    cos, sin = Qwen2VLRotaryEmbedding(text_config())(call.q, positions[:, None])
    q, k = apply_rotary_pos_emb(call.q.transpose(0, 1)[None], call.k.transpose(0, 1)[None], cos, sin)
    rotated = append_visual_kv(*call.tensors(), backend=backend)
    assert_twice_as_good(rotated, q[0].transpose(0, 1).contiguous(), rotate(call.q, call))
    assert_twice_as_good(call.k_cache[call.slots], k[0].transpose(0, 1).contiguous(), rotate(call.k, call))


@each_backend
def test_default_sections_are_qwen2_vl(backend):
    call = make(5, head_dim=128, sections=(16, 24, 24))
    other = call.fresh()
    assert_same_bits(append_visual_kv(*call.tensors(), backend=backend), other.run(backend))


@each_backend
def test_sections_choose_the_axis(backend):
    """Half-dimension i is rotated by its section's position: temporal, then height, then width."""
    call = make(1, (1, 1), 16, sections=(2, 3, 3), positions=torch.tensor([[10], [20], [30]]), capacity=1)
    call.q[:] = 0
    call.q[..., :8] = 1
    rotated = call.run(backend)[0, 0]
    axis = torch.tensor([10, 10, 20, 20, 20, 30, 30, 30])
    table = rotary_table(64, 16)
    torch.testing.assert_close(rotated[:8], table[axis, torch.arange(8)], rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated[8:], table[axis, 8 + torch.arange(8)], rtol=0, atol=1e-6)
