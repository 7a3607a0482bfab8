"""What every Triton launch needs: the tensors' device made current, and the launch that suits its architecture."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

Launch = TypeVar("Launch", bound=tuple[Any, ...])

_CURRENT: AbstractContextManager[None] = nullcontext()
TUNED_FILE = Path(__file__).with_name("tuned.json")
TUNED: dict[str, dict[str, dict[str, list[int]]]] = json.loads(TUNED_FILE.read_text())
"""Architecture ("sm_90") → kernel → size class → launch, as `bench/tune.py` measured them. Where nothing is written,
the table beside the kernel holds, with its reasons. Nothing is ever tuned while a program runs."""


def on_device(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Return a context in which kernels are launched on `tensor`'s device, on that device's current stream."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _CURRENT
    return torch.cuda.device(tensor.device)


def capability(tensor: torch.Tensor) -> int:
    """Compute capability of `tensor`'s device, major · 10 + minor: 90 is Hopper; 0 where kernels are interpreted."""
    return _capability(tensor.device.index) if tensor.is_cuda else 0


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def tuned(tensor: torch.Tensor, kernel: str, size: str, default: Launch) -> Launch:
    """Return the launch of `kernel` for a size class on `tensor`'s architecture, of `default`'s type."""
    values = TUNED.get(f"sm_{capability(tensor)}", {}).get(kernel, {}).get(size)
    return default if values is None else cast(Launch, getattr(type(default), "_make", tuple)(values))
