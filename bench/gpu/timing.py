"""Seconds of work on the device, without those of its launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bench.gpu import DEVICE, REHEARSAL

ROUNDS = 2 if REHEARSAL else 25
SLEEP_CYCLES = 3_000_000
"""About 1.5 ms that the device is kept busy before the first event: by then everything timed has been enqueued."""


def device_seconds(call: Callable[[], object], calls: int = 1, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Return median, least and largest seconds of one call, over `rounds` of `calls` calls each.

    On a GPU between two events on the stream; work queued before the first one hides the launches behind it. On the
    CPU by the wall clock.
    """
    call()
    samples = []
    for _ in range(rounds):
        if DEVICE == "cpu":
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            samples.append((time.perf_counter() - begin) / calls)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / 1e3 / calls)
    return statistics.median(samples), min(samples), max(samples)


def graph_of(call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """Return what repeats `calls` calls by replaying a graph; on the CPU by calling."""

    def several() -> None:
        for _ in range(calls):
            call()

    if DEVICE == "cpu":
        return several
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several()
    return graph.replay


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy of 1 GiB reads and writes, in this process and now."""
    size = 1 << (22 if REHEARSAL else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / device_seconds(lambda: target.copy_(source), calls=4)[0]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
