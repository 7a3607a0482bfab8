"""Memory in which `append_visual_kv` may keep its caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tests.kernels.append_inputs import Call, make

TOKENS, HEADS, DIM, CAPACITY = 19, (4, 2), 16, 40
NAN = float("nan")


def base(dtype: torch.dtype) -> Call:
    call = make(TOKENS, HEADS, DIM, dtype=dtype, capacity=CAPACITY)
    call.slots[3], call.slots[11] = -1, CAPACITY
    return call


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype)


CACHES: dict[str, Callable[[torch.dtype], tuple[list[Tensor], Tensor, Tensor]]] = {}
"""Each gives the storages, and k_cache and v_cache as views of them."""


def cache_layout(function: Callable) -> Callable:
    CACHES[function.__name__.replace("_", " ")] = function
    return function


@cache_layout
def paged(dtype):
    k, v = filled(dtype, 8, 5, 2, DIM), filled(dtype, 8, 5, 2, DIM)
    return [k, v], k, v


@cache_layout
def pages_of_one(dtype):
    k, v = filled(dtype, CAPACITY, 1, 2, DIM), filled(dtype, CAPACITY, 1, 2, DIM)
    return [k, v], k, v


@cache_layout
def one_page(dtype):
    k, v = filled(dtype, 1, CAPACITY, 2, DIM), filled(dtype, 1, CAPACITY, 2, DIM)
    return [k, v], k, v


@cache_layout
def pages_of_a_pool(dtype):
    """Every second page, K and V side by side in each."""
    pool = filled(dtype, 16, 2, 5, 2, DIM)
    return [pool], pool[::2, 0], pool[::2, 1]


@cache_layout
def long_pages_cut_short(dtype):
    k, v = filled(dtype, 10, 7, 3, DIM + 2), filled(dtype, 9, 6, 2, DIM)
    return [k, v], k[1:9, 2:7, 1:, 1:-1], v[:8, :5]


@cache_layout
def head_major_keys(dtype):
    """K stored [heads, capacity, dim], V stored [capacity, heads, dim]."""
    k, v = filled(dtype, 2, CAPACITY, DIM), filled(dtype, CAPACITY, 2, DIM)
    return [k, v], k.transpose(0, 1), v


@cache_layout
def head_major_values(dtype):
    k, v = filled(dtype, CAPACITY, 2, DIM), filled(dtype, 2, CAPACITY, DIM)
    return [k, v], k, v.transpose(0, 1)


@cache_layout
def head_major_pages(dtype):
    k, v = filled(dtype, 8, 2, 5, DIM), filled(dtype, 8, 5, 2, DIM)
    return [k, v], k.transpose(1, 2), v


@cache_layout
def keys_beside_values(dtype):
    both = filled(dtype, CAPACITY, 2, 2, DIM)
    return [both], both[:, 0], both[:, 1]


@cache_layout
def keys_and_values_in_one_row(dtype):
    both = filled(dtype, CAPACITY, 2, 2 * DIM)
    return [both], both[..., :DIM], both[..., DIM:]


@cache_layout
def a_layer_of_many(dtype):
    layers = filled(dtype, 3, 2, CAPACITY + 9, 2, DIM)
    return [layers], layers[1, 0, 4 : 4 + CAPACITY], layers[1, 1, 9:]


@cache_layout
def every_third_row(dtype):
    k, v = filled(dtype, 3 * CAPACITY, 2, DIM), filled(dtype, 2 * CAPACITY, 2, DIM)
    return [k, v], k[2::3], v[::2]


def packed(call: Call, gap: int = 0) -> tuple[Tensor, Call]:
    """q, k and v as views of one [tokens, (q heads + 2·kv heads)·dim] GEMM output, `gap` columns before each."""
    sizes = [HEADS[0] * DIM, HEADS[1] * DIM, HEADS[1] * DIM]
    buffer = torch.full((TOKENS, sum(sizes) + 4 * gap), 3.0, dtype=call.q.dtype)
    views, column = [], gap
    for size, source in zip(sizes, (call.q, call.k, call.v), strict=True):
        view = buffer[:, column : column + size].view(TOKENS, -1, DIM)
        view.copy_(source)
        views.append(view)
        column += size + gap
    return buffer, replace(call, q=views[0], k=views[1], v=views[2])
