"""Bytes and operations that a call cannot avoid, and the rates this machine reached in this run."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from bench.timers import Call, clock, prepare
from bench.workloads import LMS, Append, Control

SIZES = tuple(1 << exponent for exponent in range(18, 29, 2))
"""Bytes moved to learn the bandwidth of each level of the memory."""
MATMUL = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """What one call has to do: bytes read and written once each, and operations of its matrix products.

    byte_products: in how many products of 8-bit integers the float32 product can be written instead; 0: in none.
    """

    bytes: int
    flops: int
    byte_products: int = 0


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def roi_work(crop_bytes: int, patches: int, columns: int, embed: int, dtype: str) -> Work:
    """The crop and the folded weight are read, the tokens written; the patch matrix never needs to reach memory.

    Its left side is pixels: a float32 weight in three signed bytes a number leaves three exact byte products.
    """
    size = itemsize(dtype)
    moved, flops = crop_bytes + (columns + patches) * embed * size, 2 * patches * columns * embed
    return Work(moved, flops, 3 if dtype == "float32" else 0)


def patches_work(crop_bytes: int, patches: int, columns: int) -> Work:
    return Work(crop_bytes + patches * columns, 0)


def control_work(case: Control, width: int) -> Work:
    """Features, both weights and the control rows are read, tokens written. width: 0 for the identity form."""
    hidden, tokens, size = LMS[case.lm].hidden, case.images * case.tokens, itemsize(case.dtype)
    read = tokens * (width or hidden) + hidden * hidden + hidden * width + case.images * hidden
    flops = 2 * tokens * width * hidden + 2 * case.images * hidden * hidden + 4 * tokens * hidden
    return Work((read + tokens * hidden) * size, flops)


def append_work(case: Append) -> Work:
    """q, k and v are read and written, with one row of the table, three positions and a slot per token."""
    lm = LMS[case.lm]
    row = (lm.heads + 2 * lm.kv_heads) * lm.head_dim * itemsize(case.dtype)
    return Work(case.tokens * (2 * row + lm.head_dim * 4 + 4 * 8), 0)


def _seconds(call: Call, device: str, rounds: int = 9) -> float:
    unit, now = prepare([call], device), clock(device)
    samples = []
    for _ in range(rounds):
        begin = now()
        unit.call()
        samples.append((now() - begin) / unit.count)
    return statistics.median(samples)


@dataclass
class Ceilings:
    """moved: bytes per second, by bytes moved, of a copy or a sum, whichever is faster; flops: per second, of the
    library's matrix product, by dtype.
    """

    device: str
    moved: dict[int, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)

    @classmethod
    def measure(cls, device: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Ceilings:
        found = cls(device)
        for size in SIZES:
            source, read = torch.zeros(size // 8, device=device), torch.zeros(size // 4, device=device)
            target = torch.empty_like(source)
            calls: tuple[Call, ...] = (lambda a=target, b=source: a.copy_(b), lambda a=read: a.sum())
            found.moved[size] = size / min(_seconds(call, device) for call in calls)
        side = MATMUL[device]
        for dtype in dtypes:
            a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
            products: list[Callable[[], object]] = [lambda a=a, b=b: F.linear(a, b)]
            if dtype == "float32" and device == "cpu" and torch.backends.mkldnn.is_available():
                products.append(lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
            found.flops[dtype] = 2 * side**3 / min(_seconds(product, device) for product in products)
        a, b = (torch.randint(-128, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
        found.flops["int8"] = 2 * side**3 / _seconds(lambda: torch._int_mm(a, b.t()), device)
        return found

    def bandwidth(self, size: int) -> float:
        """Between two sizes measured, on the line between them over the size's logarithm."""
        sizes = sorted(self.moved)
        place = bisect_left(sizes, size)
        if place in (0, len(sizes)):
            return self.moved[sizes[min(place, len(sizes) - 1)]]
        low, high = sizes[place - 1 : place + 1]
        share = math.log(size / low) / math.log(high / low)
        return (1 - share) * self.moved[low] + share * self.moved[high]

    def floor(self, work: Work, dtype: str) -> float:
        """Seconds below which no implementation with these rates can fall."""
        compute = work.flops / self.flops[dtype] if work.flops else 0.0
        if work.byte_products:
            compute = min(compute, work.byte_products * work.flops / self.flops["int8"])
        return max(work.bytes / self.bandwidth(work.bytes), compute)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def best_of(cls, found: list[dict[str, Any]]) -> Ceilings:
        """The highest rates that any of several runs on one machine reached; `found`: from `as_dict`, or from JSON."""
        merged = cls(found[0]["device"])
        for one in found:
            for size, rate in one["moved"].items():
                merged.moved[int(size)] = max(rate, merged.moved.get(int(size), 0.0))
            for dtype, rate in one["flops"].items():
                merged.flops[dtype] = max(rate, merged.flops.get(dtype, 0.0))
        return merged
