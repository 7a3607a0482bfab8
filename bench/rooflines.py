"""Bytes and operations that a call cannot avoid, and the rates this machine reached in this run.

On a CPU the rates are those of loops of our own (`bench/loops.cpp`), which no library's product can pass.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from bench.loops import Loops
from bench.timers import Call, clock, prepare
from bench.workloads import LMS, Append, Control, Product

SIZES = tuple(1 << exponent for exponent in range(16, 29, 2))
"""Bytes moved to learn the bandwidth of each level of the memory."""
_MATMUL = 8192


@dataclass(frozen=True)
class Work:
    """What one call has to do: bytes read and written once each, and operations of its matrix products.

    byte_products: in how many products of 8-bit integers the float32 product can be written instead; 0: in none.
    written: of the bytes.
    """

    bytes: int
    flops: int
    byte_products: int = 0
    written: int = 0


_BITS = {"int4": 5, "w8a8": 8}


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def roi_work(crop_bytes: int, patches: int, columns: int, embed: int, dtype: str) -> Work:
    """Count the crop and the folded weight as read, the tokens as written; the patch matrix need not reach memory.

    Its left side is pixels: a float32 weight in three signed bytes a number leaves three exact byte products.
    """
    size = itemsize(dtype)
    moved, flops = crop_bytes + (columns + patches) * embed * size, 2 * patches * columns * embed
    return Work(moved, flops, 3 if dtype == "float32" else 0, patches * embed * size)


def patches_work(crop_bytes: int, patches: int, columns: int) -> Work:
    return Work(crop_bytes + patches * columns, 0, written=patches * columns)


def control_work(case: Control, width: int) -> Work:
    """Count features, both weights and the control rows as read, tokens as written. width: 0 for the identity form."""
    hidden, tokens, size = LMS[case.lm].hidden, case.images * case.tokens, itemsize(case.dtype)
    read = tokens * (width or hidden) + hidden * hidden + hidden * width + case.images * hidden
    flops = 2 * tokens * width * hidden + 2 * case.images * hidden * hidden + 4 * tokens * hidden
    return Work((read + tokens * hidden) * size, flops, written=tokens * hidden * size)


def append_work(case: Append) -> Work:
    """Count q, k and v as read and written, with one row of the table, three positions and a slot per token."""
    lm = LMS[case.lm]
    row = (lm.heads + 2 * lm.kv_heads) * lm.head_dim * itemsize(case.dtype)
    return Work(case.tokens * (2 * row + lm.head_dim * 4 + 4 * 8), 0, written=case.tokens * row)


def product_work(case: Product) -> Work:
    """Count the weight as it is kept and x as read, the result as written. x of 16 bits times 8: two byte products.

    int4 has 20 bytes for 32 columns. x of w8a8 has 8 bits.
    """
    bits, result = _BITS.get(case.weights) or 8 * itemsize(case.weights), case.rows * case.columns * 4
    read = case.columns * case.features * bits // 8 + case.rows * case.features * 4
    flops = 2 * case.rows * case.columns * case.features
    return Work(read + result, flops, {"int8": 2, "int4": 2, "w8a8": 1}.get(case.weights, 0), written=result)


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
    """The rates that this machine reached in this run.

    moved: bytes per second, by bytes moved, in whichever way is fastest. flops: per second, by dtype, of fused
    multiply-adds in registers, on a GPU of the library's matrix product. ways: as `moved`, by way: "read", "written",
    and "copied", which counts what is read and what is written.
    """

    device: str
    moved: dict[int, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    ways: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def measure(cls, device: str) -> Ceilings:
        return cls._of_loops(Loops.compiled(), torch.get_num_threads()) if device == "cpu" else cls._of_torch(device)

    @classmethod
    def _of_loops(cls, loops: Loops, threads: int) -> Ceilings:
        found = cls("cpu", ways=loops.moved(SIZES, threads))
        found.moved = {size: max(rates[size] for rates in found.ways.values()) for size in SIZES}
        rates = loops.multiplied(threads)
        # What has no unit of its own, or a slower one, is converted and goes through float32's.
        floats = rates["float32"]
        found.flops = {dtype: max(rates.get(dtype, 0.0), floats) for dtype in ("float32", "bfloat16", "int8")}
        return found

    @classmethod
    def _of_torch(cls, device: str) -> Ceilings:
        found = cls(device)
        for size in SIZES:
            source, read = torch.zeros(size // 8, device=device), torch.zeros(size // 4, device=device)
            target = torch.empty_like(source)
            calls: tuple[Call, ...] = (lambda a=target, b=source: a.copy_(b), lambda a=read: a.sum())
            found.moved[size] = size / min(_seconds(call, device) for call in calls)
        for dtype in ("float32", "bfloat16"):
            a, b = (torch.randn(_MATMUL, _MATMUL, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
            found.flops[dtype] = 2 * _MATMUL**3 / _seconds(lambda a=a, b=b: F.linear(a, b), device)
        a, b = (torch.randint(-128, 128, (_MATMUL, _MATMUL), device=device, dtype=torch.int8) for _ in range(2))
        found.flops["int8"] = 2 * _MATMUL**3 / _seconds(lambda: torch._int_mm(a, b.t()), device)
        return found

    def bandwidth(self, size: int) -> float:
        return _between(self.moved, size)

    def moving(self, work: Work) -> float:
        """Return the seconds to read and write the work's bytes, each way at the rate that it has at their sum."""
        if not self.ways:
            return work.bytes / self.bandwidth(work.bytes)
        read, written = work.bytes - work.written, work.written
        rate = {way: _between(rates, work.bytes) for way, rates in self.ways.items()}
        both = min(read, written)
        apart = read / rate["read"] + written / rate["written"]
        paired = 2 * both / rate["copied"] + (read - both) / rate["read"] + (written - both) / rate["written"]
        return min(apart, paired)

    def floor(self, work: Work, dtype: str) -> float:
        """Return the seconds below which no implementation with these rates can fall."""
        compute = work.flops / self.flops[dtype] if work.flops else 0.0
        if work.byte_products:
            compute = min(compute, work.byte_products * work.flops / self.flops["int8"])
        return max(self.moving(work), compute)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def best_of(cls, found: list[dict[str, Any]]) -> Ceilings:
        """Return the highest rates that any of several runs on one machine reached; `found`: from `as_dict`, or from
        JSON.
        """
        merged = cls(found[0]["device"])
        for one in found:
            _raise(merged.moved, one["moved"], int)
            _raise(merged.flops, one["flops"], str)
            for way, rates in one.get("ways", {}).items():
                _raise(merged.ways.setdefault(way, {}), rates, int)
        return merged


def _raise(best: dict[Any, float], rates: Mapping[Any, float], key: Any) -> None:
    for name, rate in rates.items():
        best[key(name)] = max(rate, best.get(key(name), 0.0))


def _between(rates: Mapping[int, float], size: int) -> float:
    """Return the rate at `size`: between two sizes measured, on the line between them over the size's logarithm."""
    sizes = sorted(rates)
    place = bisect_left(sizes, size)
    if place in (0, len(sizes)):
        return rates[sizes[min(place, len(sizes) - 1)]]
    low, high = sizes[place - 1 : place + 1]
    share = math.log(size / low) / math.log(high / low)
    return (1 - share) * rates[low] + share * rates[high]
