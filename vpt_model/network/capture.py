"""CUDA graphs: how a step of fixed shape is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def record(run: Callable[[], tuple[Tensor, ...]], pool: Any) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Capture `run` and its outputs. It runs twice before: kernels are compiled and libraries take their workspace."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = run()
    return graph, outputs
