"""What every Triton launch needs: the tensors' device made current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_CURRENT = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """A context in which kernels are launched on `tensor`'s device, on that device's current stream."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _CURRENT
    return torch.cuda.device(tensor.device)


def capability(tensor: torch.Tensor) -> int:
    """Compute capability of `tensor`'s device, major · 10 + minor: 90 is Hopper; 0 where kernels are interpreted."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
