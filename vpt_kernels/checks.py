"""Argument checks shared by the public functions; every message states the value, the limit and the remedy."""

from __future__ import annotations

import os
from operator import index
from typing import Any

import torch
from torch import Tensor

CHECK_VALUES = os.environ.get("VPT_KERNELS_CHECK") == "1"
"""Also validate the values of index tensors, which costs a synchronisation on a GPU; set VPT_KERNELS_CHECK=1."""


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


def require_disjoint(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise ValueError if two tensors share memory."""
    begin_a, begin_b = a.data_ptr(), b.data_ptr()
    end_a, end_b = (t.data_ptr() + t.element_size() * (1 + _last_offset(t)) for t in (a, b))
    if a.numel() and b.numel() and a.device == b.device and begin_a < end_b and begin_b < end_a:
        raise ValueError(
            f"{first} and {second} share memory: rows would be overwritten before they are read; clone one"
        )


def _last_offset(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def require_slots(name: str, slots: Tensor, capacity: int) -> None:
    """Raise ValueError for an index that would be skipped because it is too large, or that occurs twice."""
    used = slots[slots >= 0]
    if used.numel() and int(used.max()) >= capacity:
        raise ValueError(f"{name} reach {int(used.max())}; the capacity is {capacity}: these would not be stored")
    if used.unique().numel() != used.numel():
        raise ValueError(f"{name} hold an index twice; which token is stored would be undefined")


def require_segments(ends: Tensor, tokens: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to the number of tokens."""
    values = ends.tolist()
    if values[0] != 0 or values[-1] != tokens or any(b < a for a, b in zip(values, values[1:])):
        raise ValueError(f"cu_seqlens is {values}; it must rise from 0 to the number of tokens, {tokens}")


def require_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The integer; raise TypeError for another type (floats and bools too), ValueError outside [low, high]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} is {shown(value)}; it must be an integer") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} is {number}; it must be at least {low}{'' if high is None else f', at most {high}'}")
    return number


def require_flag(name: str, value: Any) -> None:
    """Raise TypeError for anything but True and False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} is {shown(value)}; it must be True or False")


def shown(value: Any) -> str:
    """A value as messages name it: its type where it is no plain value, because a tensor's would have to be read."""
    return f"{value!r:.80}" if isinstance(value, (str, int, float, bytes, type(None))) else f"a {type(value).__name__}"
