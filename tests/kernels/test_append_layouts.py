"""The memory `append_visual_kv` accepts: packed inputs, paged and interleaved caches, strides of any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits, each_backend, each_dtype, virtual_bytes
from tests.kernels.append_checks import each_form, execute
from tests.kernels.append_inputs import make, stored
from tests.kernels.cache_layouts import CACHES, CAPACITY, DIM, HEADS, NAN, base, packed


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("layout", CACHES)
def test_cache_layouts(backend, dtype, in_place, layout):
    """The rows of the plain layout, in place; every other byte of the storages as it was."""
    plain = base(dtype)
    rotated = execute(plain, backend, in_place)
    storages, k_cache, v_cache = CACHES[layout](dtype)
    shapes = [(t.shape, t.stride(), t.storage_offset()) for t in (k_cache, v_cache)]
    owners = [next(s for s in storages if s.data_ptr() == t.untyped_storage().data_ptr()) for t in (k_cache, v_cache)]
    expected = [storage.clone() for storage in storages]
    for (shape, stride, offset), owner, done in zip(shapes, owners, (plain.k_cache, plain.v_cache), strict=True):
        copy = expected[[s is owner for s in storages].index(True)]
        view = copy.as_strided(shape, stride, offset)
        for _, slot in stored(plain.slots, CAPACITY):
            target = view[slot] if view.dim() == 3 else view[slot // shape[1], slot % shape[1]]
            target.copy_(done[slot])
    actual = execute(replace(base(dtype), k_cache=k_cache, v_cache=v_cache), backend, in_place)
    assert_same_bits(actual, rotated, "rotated q")
    for storage, want in zip(storages, expected, strict=True):
        assert_same_bits(storage, want, "cache storage")


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("gap", (0, 3))
def test_packed_projection(backend, dtype, in_place, gap):
    """In place, the q part of the buffer changes and nothing else; fresh, nothing changes."""
    plain = base(dtype)
    rotated = execute(plain, backend, in_place)
    buffer, call = packed(base(dtype), gap)
    expected = buffer.clone()
    if in_place:
        expected[:, gap : gap + HEADS[0] * DIM] = rotated.flatten(1)
    assert_same_bits(execute(call, backend, in_place).contiguous(), rotated)
    assert_same_bits(buffer, expected, "packed buffer")
    assert_same_bits(call.k_cache, plain.k_cache)
    assert_same_bits(call.v_cache, plain.v_cache)


INPUTS = {
    "head major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second token": lambda t: torch.stack([t, t * 0], 1).flatten(0, 1)[::2],
    "part of wider heads": lambda t: torch.nn.functional.pad(t, (5, 2))[..., 5:-2],
    "some of the heads": lambda t: torch.nn.functional.pad(t, (0, 0, 1, 3))[:, 1:-3],
}


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("layout", INPUTS)
def test_input_strides(backend, dtype, in_place, layout):
    plain = base(dtype)
    views = {name: INPUTS[layout](getattr(plain, name).clone()) for name in ("q", "k", "v")}
    rotated = execute(plain, backend, in_place)
    call = replace(base(dtype), **views)
    assert not call.q.is_contiguous()
    assert_same_bits(execute(call, backend, in_place).contiguous(), rotated)
    assert_same_bits(call.k_cache, plain.k_cache)
    assert_same_bits(call.v_cache, plain.v_cache)


@each_backend
def test_broadcast_keys(backend):
    """One head's keys and values for every head: head stride 0."""
    call = base(torch.float32)
    call = replace(call, k=call.k[:, :1].expand(-1, 2, -1), v=call.v[:, :1].expand(-1, 2, -1))
    plain = replace(call.fresh(), k=call.k.contiguous(), v=call.v.contiguous())
    assert_same_bits(call.run(backend), plain.run(backend))
    assert_same_bits(call.k_cache, plain.k_cache)
    assert_same_bits(call.v_cache, plain.v_cache)


@each_backend
@pytest.mark.parametrize("index", (torch.int32, torch.int64))
def test_index_and_table_strides(backend, index):
    plain = base(torch.float32)
    rotated = plain.run(backend)
    call = base(torch.float32)
    positions, slots = call.positions.to(index), call.slots.to(index)
    wide = torch.full((len(call.cos_sin), DIM + 7), NAN)
    wide[:, 3 : 3 + DIM] = call.cos_sin
    call = replace(
        call,
        positions=positions.T.contiguous().T,
        slots=torch.stack([slots, slots + 1], 1)[:, 0],
        cos_sin=wide[:, 3 : 3 + DIM],
    )
    assert_same_bits(call.run(backend), rotated)
    assert_same_bits(call.k_cache, plain.k_cache)
    text = replace(base(torch.float32), positions=positions[:1].expand(3, -1))
    flat = replace(base(torch.float32), positions=positions[:1].expand(3, -1).contiguous())
    assert_same_bits(text.run(backend), flat.run(backend))


FAR = (1 << 31) + 96
"""Bytes: the distance of two rows, beyond what 32-bit arithmetic reaches."""


def far(dtype: torch.dtype, shape: tuple[int, ...], axis: int, distance: int = FAR) -> Tensor:
    """A tensor of that shape whose steps along `axis` are `distance` bytes."""
    stride = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        stride[i] = stride[i + 1] * shape[i + 1]
    stride[axis] = distance // dtype.itemsize
    storage = virtual_bytes(distance * shape[axis]).view(dtype)
    return storage.as_strided(shape, stride)


@each_backend
@each_dtype
@pytest.mark.parametrize("axis", (0, 1), ids=("row", "head"))
def test_caches_beyond_32_bits(backend, dtype, axis):
    plain = make(2, HEADS, DIM, dtype=dtype, capacity=3)
    call = plain.fresh()
    k_cache, v_cache = far(dtype, (3, 2, DIM), axis), far(dtype, (3, 2, DIM), axis)
    k_cache.fill_(NAN)
    v_cache.fill_(NAN)
    call = replace(call, k_cache=k_cache, v_cache=v_cache)
    assert_same_bits(call.run(backend), plain.run(backend))
    assert_same_bits(k_cache.contiguous(), plain.k_cache)
    assert_same_bits(v_cache.contiguous(), plain.v_cache)


@each_backend
@each_dtype
@pytest.mark.parametrize("axis", (0, 1), ids=("page", "row"))
def test_pages_beyond_32_bits(backend, dtype, axis):
    plain = make(3, HEADS, DIM, dtype=dtype, capacity=6)
    cache = far(dtype, (2, 3, 2, DIM), axis)
    cache.fill_(NAN)
    call = replace(plain.fresh(), k_cache=cache, v_cache=plain.v_cache.clone().view(2, 3, 2, DIM))
    call.run(backend)
    plain.run(backend)
    assert_same_bits(cache.reshape(6, 2, DIM), plain.k_cache)
    assert_same_bits(call.v_cache.view(6, 2, DIM), plain.v_cache)


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("axis", (0, 1), ids=("token", "head"))
def test_inputs_beyond_32_bits(backend, dtype, in_place, axis):
    plain = make(2, HEADS, DIM, dtype=dtype)
    views = {}
    for name in ("q", "k", "v"):
        source = getattr(plain, name)
        views[name] = far(dtype, tuple(source.shape), axis).copy_(source)
    call = replace(plain.fresh(), **views)
    assert_same_bits(execute(call, backend, in_place).contiguous(), execute(plain, backend, in_place))
    assert_same_bits(call.k_cache, plain.k_cache)
    assert_same_bits(call.v_cache, plain.v_cache)


@each_backend
def test_table_rows_beyond_32_bits(backend):
    plain = make(2, HEADS, DIM, table_rows=3)
    call = replace(plain.fresh(), cos_sin=far(torch.float32, (3, DIM), 0).copy_(plain.cos_sin))
    assert_same_bits(call.run(backend), plain.run(backend))
    assert_same_bits(call.k_cache, plain.k_cache)
