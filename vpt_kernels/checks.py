"""Argument checks shared by the public functions; every message states the value, the limit and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor


def require_inference(**tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor would be recorded by autograd: the operators are forward only."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but this operator is forward only; call it under torch.no_grad() or "
                f"torch.inference_mode(), or pass {name}.detach()"
            )


def require_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None, dim: int | None
) -> None:
    """Raise TypeError for a wrong type or dtype, ValueError for a wrong device or rank; None accepts any."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it must be a torch.Tensor")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}; it must be {dtype}, as the other tensors")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, other tensors on {device}; move them to one device")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name} has {tensor.dim()} dimensions {tuple(tensor.shape)}; it must have {dim}")
