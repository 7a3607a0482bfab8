"""Inputs of the decode layer's attention, with everything that must not be read NaN."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tests.helpers import normal
from vpt_kernels import rotary_table

NAN = float("nan")


@dataclass(frozen=True)
class Step:
    """Arguments of `vpt_model.network.decode.attention.attend`, without the tickets."""

    qkv: Tensor
    table: Tensor
    sections: tuple[int, int, int]
    positions: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor
    starts: Tensor
    past: Tensor
    counts: Tensor
    capacity: int

    def arguments(self, dtype: torch.dtype | None = None) -> list[object]:
        """Copies; floating-point tensors in `dtype`, if given."""
        values = (getattr(self, field.name) for field in fields(self))
        return [
            x if not isinstance(x, Tensor) else x.to(dtype, copy=True) if dtype and x.is_floating_point() else x.clone()
            for x in values
        ]


def make(past: list[int], *, dtype=torch.float32, heads=(6, 2), dim=32, capacity=200, padding=(), key="") -> Step:
    """One conversation per number in `past`; those in `padding` have no new token."""
    rows, (q_heads, kv_heads) = len(past), heads
    # Rows in any order, a row between them that belongs to nobody, and a layer before this one.
    starts = torch.tensor([(rows - row) * capacity for row in range(rows)], dtype=torch.int32)
    caches = torch.full((2, 2, (rows + 1) * capacity, kv_heads, dim), NAN, dtype=dtype)
    keys, values = caches[0, 1], caches[1, 1]
    for row, (start, length) in enumerate(zip(starts.tolist(), past)):
        for name, cache in (("k", keys), ("v", values)):
            cache[start : start + length] = normal(length, kv_heads, dim, key=(key, name, row), dtype=dtype)
    counts = torch.tensor([row not in padding for row in range(rows)], dtype=torch.int32)
    lengths = torch.tensor(past, dtype=torch.int32)
    qkv = normal(rows, (q_heads + 2 * kv_heads) * dim, key=(key, "qkv"), dtype=dtype)
    qkv[counts == 0] = NAN
    half = dim // 2
    sections = (half // 4, (half - half // 4) // 2)
    positions = (normal(3, rows, key=(key, "p")) * 40 + 200).int()
    return Step(
        qkv,
        rotary_table(400, dim),
        (*sections, half - sum(sections)),
        positions,
        torch.where(counts > 0, starts + lengths, -1),
        keys,
        values,
        starts,
        lengths,
        counts,
        capacity,
    )
