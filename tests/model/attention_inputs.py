"""Calls of `vpt_model.network.attention.attend` with everything that must not be read NaN, and an oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers import normal

NAN = float("nan")


@dataclass(frozen=True)
class Call:
    """Arguments of `attend`; everything that must not be read is NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    starts: Tensor
    past: Tensor
    counts: Tensor
    capacity: int

    def to(self, device: str) -> Call:
        return Call(*(x.to(device) if isinstance(x, Tensor) else x for x in vars(self).values()))

    def real(self, out: Tensor) -> Tensor:
        """The rows of real tokens, one after the other."""
        return torch.cat([rows[len(rows) - count :] for rows, count in zip(out, self.counts.tolist())])

    def used(self) -> Tensor:
        return torch.cat([torch.arange(s, s + p + c) for s, p, c in zip(self.starts, self.past, self.counts)])


def make(
    counts: list[int], past: list[int], bucket: int, heads=(6, 2), dim=16, capacity=200, dtype=torch.float32, key=""
) -> Call:
    rows, (q_heads, kv_heads) = len(counts), heads
    packed = normal(rows, bucket, (q_heads + 2 * kv_heads) * dim + 3, key=(key, "q"), dtype=dtype)[..., 3:]
    q = packed.unflatten(2, (-1, dim))[:, :, :q_heads]
    # Rows in any order, a row between them that belongs to nobody, and a layer before this one.
    starts = torch.tensor([(rows - row) * capacity for row in range(rows)], dtype=torch.int32)
    caches = torch.full((2, 2, (rows + 1) * capacity, kv_heads, dim), NAN, dtype=dtype)
    call = Call(
        q, caches[0, 1], caches[1, 1], starts, *(torch.tensor(x, dtype=torch.int32) for x in (past, counts)), capacity
    )
    for name, cache in (("k", call.keys), ("v", call.values)):
        cache[call.used()] = normal(len(call.used()), kv_heads, dim, key=(key, name), dtype=dtype)
    for row, count in enumerate(counts):
        q[row, : bucket - count] = NAN
    return call


def oracle(call: Call, dtype: torch.dtype = torch.float64) -> Tensor:
    group = call.q.shape[2] // call.keys.shape[1]
    rows = []
    for r, (start, past, count) in enumerate(zip(*(x.tolist() for x in (call.starts, call.past, call.counts)))):
        for i in range(count):
            k, v = (x[start : start + past + i + 1].to(dtype) for x in (call.keys, call.values))
            heads = []
            for h in range(call.q.shape[2]):
                scores = k[:, h // group] @ call.q[r, i - count, h].to(dtype) * call.q.shape[3] ** -0.5
                heads.append(scores.softmax(0) @ v[:, h // group])
            rows.append(torch.cat(heads))
    return torch.stack(rows) if rows else torch.empty(0, call.q[0, 0].numel(), dtype=dtype)
