"""Calls of `append_visual_kv` and their composition in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.helpers import normal, numbers
from vpt_kernels import append_visual_kv, append_visual_kv_, rotary_table


@dataclass(frozen=True)
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    cos_sin: Tensor
    positions: Tensor
    slots: Tensor
    k_cache: Tensor
    v_cache: Tensor
    sections: tuple[int, int, int]
    interleaved: bool = False
    layout: str = "NHD"
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6

    def options(self) -> dict:
        names = ("sections", "interleaved", "layout", "k_scale", "v_scale", "q_norm", "k_norm", "norm_eps")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, self.cos_sin, self.positions, self.slots, self.k_cache, self.v_cache)

    def run(self, backend: str) -> Tensor:
        return append_visual_kv(*self.tensors(), **self.options(), backend=backend)

    def run_in_place(self, backend: str) -> None:
        return append_visual_kv_(*self.tensors(), **self.options(), backend=backend)

    def fresh(self) -> Call:
        """The same call with q and both caches copied."""
        return replace(self, q=self.q.clone(), k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone())


def mrope(before: int, grid: tuple[int, int], after: int, start: int = 0) -> Tensor:
    """int64 [3, tokens]: text, an image of (rows, columns) tokens, text."""
    columns = [[start + i] * 3 for i in range(before)]
    first = start + before
    columns += [[first, first + r, first + c] for r in range(grid[0]) for c in range(grid[1])]
    first += max(grid)
    columns += [[first + i] * 3 for i in range(after)]
    return torch.tensor(columns, dtype=torch.int64).reshape(-1, 3).T.contiguous()


def make(
    tokens: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    rotary_dim: int | None = None,
    sections: tuple[int, int, int] | None = None,
    capacity: int = 40,
    table_rows: int = 4096,
    positions: Tensor | None = None,
    key: object = "append",
) -> Call:
    """Random q, k, v; distinct random slots; caches full of NaN."""
    rng = numbers(key, tokens, heads, head_dim)
    rotary_dim = rotary_dim or head_dim
    if sections is None:  # a quarter, and three eighths twice, as (16, 24, 24) of 64
        half = rotary_dim // 2
        sections = (half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8)
    if positions is None:
        positions = torch.from_numpy(rng.integers(0, table_rows, (3, tokens)))
    caches = [torch.full((capacity, heads[1], head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    return Call(
        normal(tokens, heads[0], head_dim, key=(key, "q"), dtype=dtype, scale=4),
        normal(tokens, heads[1], head_dim, key=(key, "k"), dtype=dtype, scale=4),
        normal(tokens, heads[1], head_dim, key=(key, "v"), dtype=dtype),
        rotary_table(table_rows, rotary_dim),
        positions,
        torch.from_numpy(rng.permutation(capacity)[:tokens].copy()),
        *caches,
        sections,
    )


def angles(call: Call) -> tuple[Tensor, Tensor]:
    """float32 cos and sin [tokens, 1, rotary_dim / 2], by the section of each half-dimension."""
    half = call.cos_sin.shape[1] // 2
    if call.interleaved:  # t h w t h w … while there are three, then what is left of t
        axis = torch.zeros(half, dtype=torch.int64)
        for number in (1, 2):
            axis[number : 3 * call.sections[number] : 3] = number
    else:
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(call.sections))
    rows = call.positions.long()[axis].T  # [tokens, half]
    index = torch.arange(half).expand_as(rows)
    return call.cos_sin[rows, index][:, None], call.cos_sin[rows, half + index][:, None]


def rotate(x: Tensor, call: Call, dtype: torch.dtype = torch.float64) -> Tensor:
    """transformers' x·cos + rotate_half(x)·sin, every intermediate in `dtype`."""
    half = call.cos_sin.shape[1] // 2
    cos, sin = (t.to(dtype).repeat(1, 1, 2) for t in angles(call))
    x = x.to(dtype)
    swapped = torch.cat([-x[..., half : 2 * half], x[..., :half]], -1)
    return torch.cat([x[..., : 2 * half] * cos + swapped * sin, x[..., 2 * half :]], -1)


def stored(slots: Tensor, capacity: int) -> list[tuple[int, int]]:
    """(token, slot) of the tokens that are written."""
    return [(token, slot) for token, slot in enumerate(slots.tolist()) if 0 <= slot < capacity]
