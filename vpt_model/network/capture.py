"""CUDA graphs: how a step of fixed shape is recorded; and how its inputs reach the device without a wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


def record(
    run: Callable[[], tuple[Tensor, ...]], pool: Any, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Capture `run` and its outputs. It runs twice before: kernels are compiled and libraries take their workspace.

    stream: to capture on, by default the one that all such graphs share. Graphs captured on one stream also share
    cuBLAS's workspace, whatever their pools: those that may be replayed at the same time need a stream each.
    """
    side = _warm_up_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = run()
    return graph, outputs


@cache
def _warm_up_stream(device: int) -> torch.cuda.Stream:
    """Return the one stream of all warm-ups: every further one would cost another workspace of cuBLAS."""
    return torch.cuda.Stream(device)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the current stream is that of `tensor`'s device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """Return x on `device`; from the host to a GPU through pinned memory, for which nobody waits."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
