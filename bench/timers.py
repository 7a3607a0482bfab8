"""Clocks and paired comparisons.

Ours and every alternative are timed in turn, round by round, so that all see the same neighbours, clocks and caches;
what is reported is the median of the rounds' ratios with a distribution-free 95 % interval.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

GRAPH_CALLS = 20
"""Calls in one captured graph: enough that the launch of the graph itself does not count."""
FEWEST_ROUNDS = 6
"""Both ends of five values hold the median with 94 %, of six with 97 %."""
NOISY = 0.2
"""Half width of a ratio's interval, relative to the ratio, from which a row is called noisy."""


class DeviceClock:
    """Seconds of the current CUDA stream, readable like `time.perf_counter`.

    The sum of the times between events: one time since a first event would be a float32 of milliseconds, which
    resolves 16 µs after two minutes.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


def clock(device: str) -> Callable[[], float]:
    """Return what times calls on `device`: the processor's clock, or the stream's events."""
    return DeviceClock() if device == "cuda" else time.perf_counter


@dataclass(frozen=True)
class Repeated:
    """A call that stands for `count` calls, and whether it is a replayed graph."""

    call: Call
    count: int
    graph: bool


def prepare(variants: Sequence[Call], device: str, warm_up: bool = True, capture: bool = True) -> Repeated:
    """Return one timed unit from calls that differ in their buffers only.

    CPU: one call, the variants in turn. CUDA: a graph of `GRAPH_CALLS` calls over the rotating buffers, so that inputs
    come from memory, not from the L2 cache; what cannot be captured, or must not be because it has to differ from call
    to call, is called eagerly as often.
    """
    position = -1

    def turn() -> object:
        nonlocal position
        position = (position + 1) % len(variants)
        return variants[position]()

    for _ in range(max(2, len(variants) if device == "cuda" else 0) if warm_up else 0):
        turn()
    if device != "cuda":
        return Repeated(turn, 1, False)
    eager = Repeated(lambda: [turn() for _ in range(GRAPH_CALLS)], GRAPH_CALLS, False)
    if not capture:
        return eager
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                turn()
    except RuntimeError:
        torch.cuda.synchronize()
        return eager
    return Repeated(graph.replay, GRAPH_CALLS, True)


def host_microseconds(call: Call, device: str, calls: int = 100) -> float:
    """Return host time of one call: on a GPU until it is enqueued, on the CPU until it is done. Median of
    ten series.
    """
    samples = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(samples)


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios alternative / ours (above 1: ours is faster) and its 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        return self.high - self.low > 2 * NOISY * self.ratio


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Return the ratio of two series measured in the same rounds.

    Raises:
        ValueError: the series are not paired, or shorter than `FEWEST_ROUNDS`.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"series of {len(theirs)} and {len(ours)} rounds cannot be paired; measure them together")
    ratios = [a / b for a, b in zip(theirs, ours)]
    return Ratio(statistics.median(ratios), *median_interval(ratios))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest symmetric order statistics that hold the median with 95 %, whatever the distribution.

    Of n values, r or fewer lie below the median as often as a fair coin shows heads r times or fewer.

    Raises:
        ValueError: there are fewer than `FEWEST_ROUNDS`, of which not even both ends would do.
    """
    count, values = len(values), sorted(values)
    if count < FEWEST_ROUNDS:
        raise ValueError(f"{count} rounds cannot bound a median with 95 %; measure at least {FEWEST_ROUNDS}")
    below, rank = 0.0, -1
    while below + math.comb(count, rank + 1) / 2**count <= 0.025:
        rank += 1
        below += math.comb(count, rank) / 2**count
    return values[rank], values[count - 1 - rank]
