"""What every call of `append_visual_kv` must fulfil, and tensors whose strides pass 32 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits, assert_twice_as_good, virtual_bytes
from tests.kernels.append_inputs import Call, rotate, stored

each_form = pytest.mark.parametrize("in_place", (False, True), ids=("fresh", "in place"))


def execute(call: Call, backend: str, in_place: bool) -> Tensor:
    """The rotated q."""
    if in_place:
        call.run_in_place(backend)
        return call.q
    return call.run(backend)


def check_caches(call: Call, before: Call) -> None:
    """Stored rows are right, v and the dimensions that do not rotate to the bit; every other row is as it was."""
    caches = [cache.reshape(-1, *cache.shape[-2:]) for cache in (call.k_cache, call.v_cache)]
    k_expected, v_expected = (
        cache.reshape(-1, *cache.shape[-2:]).clone() for cache in (before.k_cache, before.v_cache)
    )
    pairs = stored(call.slots, len(k_expected))
    tokens, slots = [t for t, _ in pairs], [s for _, s in pairs]
    v_expected[slots] = before.v[tokens]
    assert_same_bits(caches[1], v_expected, "v_cache")
    k_rows = caches[0][slots]
    eager, oracle = rotate(before.k, before, call.k.dtype)[tokens], rotate(before.k, before)[tokens]
    assert_twice_as_good(k_rows, eager, oracle, "rotated k")
    passed = before.cos_sin.shape[1]
    assert_same_bits(k_rows[..., passed:], before.k[tokens][..., passed:], "unrotated k")
    k_expected[slots] = k_rows
    assert_same_bits(caches[0], k_expected, "k_cache")
    assert_same_bits(call.k, before.k, "input k")
    assert_same_bits(call.v, before.v, "input v")


def check(call: Call, backend: str) -> torch.Tensor:
    before = replace(call.fresh(), k=call.k.clone(), v=call.v.clone())
    in_place = replace(call.fresh(), k=call.k.clone(), v=call.v.clone())
    rotated = call.run(backend)
    assert rotated.is_contiguous()
    assert not rotated.numel() or rotated.data_ptr() != call.q.data_ptr()
    assert_same_bits(call.q, before.q, "input q")
    assert_twice_as_good(rotated, rotate(before.q, before, call.q.dtype), rotate(before.q, before), "rotated q")
    passed = before.cos_sin.shape[1]
    assert_same_bits(rotated[..., passed:], before.q[..., passed:], "unrotated q")
    check_caches(call, before)
    assert in_place.run_in_place(backend) is None
    assert_same_bits(in_place.q, rotated, "q in place")
    for name in ("k_cache", "v_cache", "k", "v"):
        assert_same_bits(getattr(in_place, name), getattr(call, name), name)
    return rotated


WRAPS = (1 << 32) + 48
"""Elements: cut to 32 bits, signed or not, a distance that lands inside the tensor."""


def wrapping(x: Tensor, axis: int) -> Tensor:
    """A copy of x whose steps along `axis` are `WRAPS` elements."""
    stride = list(torch.empty(x.shape, device="meta").stride())
    stride[axis] = WRAPS
    storage = virtual_bytes((x.shape[axis] * WRAPS + x.numel()) * x.element_size()).view(x.dtype)
    return storage.as_strided(x.shape, stride).copy_(x)
