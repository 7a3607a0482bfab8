"""Argument checks shared by the public functions; every message states the value, the limit and the remedy."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; it must be strided: call {name}.to_dense()")
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor; it must be one strided tensor: call {name}.to_padded_tensor()")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, other tensors on {device}; move them to one device")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name} has {tensor.dim()} dimensions {tuple(tensor.shape)}; it must have {dim}")


def require_disjoint(
    written: Mapping[str, Tensor], read: Mapping[str, Tensor | None], itself: Collection[str] = ()
) -> None:
    """Raise ValueError if a tensor that is written shares memory with another, or one of its elements with another.

    itself: names of what is read element by element, and may be a tensor that is written.

    Views of one allocation that have no element in common pass: q, k and v of a packed projection, keys and values side
    by side in the pages of one pool. Addresses are compared, never followed; while a graph is traced there are none.
    """
    if torch.compiler.is_compiling():
        return
    targets: list[tuple[int, int, str]] = []
    for group in (written, read):
        for name, tensor in group.items():
            if tensor is None:
                continue
            if type(tensor) is FakeTensor:
                return
            begin = tensor.data_ptr()
            end = begin + (tensor.nbytes if tensor.is_contiguous() else _reach(tensor))
            for first, last, target in targets:
                # Spans that meet are rare, and only then the elements are compared.
                if begin < last and first < end and share_memory(written[target], tensor):
                    if name in itself and begin == first and tensor.stride() == written[target].stride():
                        continue
                    raise ValueError(
                        f"{name} and {target} share memory: rows would be overwritten before they are read; "
                        f"clone {name}"
                    )
            if group is written:
                targets.append((begin, end, name))
                if not tensor.is_contiguous() and _overlaps_itself(tensor):
                    raise ValueError(
                        f"{name} has strides {tensor.stride()} at shape {tuple(tensor.shape)}: some of its elements "
                        "are one and the same memory and would be written several times; pass a clone"
                    )


def _reach(tensor: Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have a byte in common; exact for strides of any kind."""
    if a.device != b.device or a.device.type == "meta" or not a.numel() or not b.numel():
        return False
    distance = b.data_ptr() - a.data_ptr()
    return _share(distance, a.shape, a.stride(), a.element_size(), b.shape, b.stride(), b.element_size())


@lru_cache(maxsize=1024)
def _share(
    distance: int,
    shape_a: tuple[int, ...],
    strides_a: tuple[int, ...],
    size_a: int,
    shape_b: tuple[int, ...],
    strides_b: tuple[int, ...],
    size_b: int,
) -> bool:
    """Answer `share_memory` from sizes and strides in elements, element sizes and the distance of the first bytes."""
    a = _Addresses(_SOMEWHERE, shape_a, strides_a, size_a)
    b = _Addresses(_SOMEWHERE + distance, shape_b, strides_b, size_b)
    try:
        return np.shares_memory(np.asarray(a), np.asarray(b), max_work=_MOST_WORK)
    except np.exceptions.TooHardError:
        return True


_SOMEWHERE = 1 << 60
_MOST_WORK = 100_000
"""Of numpy's search, a few milliseconds; views of one allocation as people make them take less than a hundred steps."""


class _Addresses:
    """What numpy takes for an array at these addresses; they are compared and never followed."""

    def __init__(self, begin: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (begin, True),
            "shape": tuple(shape),
            "strides": tuple(stride * size for stride in strides),
        }


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two indices name the same memory."""
    if not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    # Two such indices differ first in some axis; all steps along an axis are alike, so the lower one may be 0 there.
    while tensor.dim():
        if tensor.shape[0] > 1 and share_memory(tensor[0], tensor[1:]):
            return True
        tensor = tensor[0]
    return False


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


def require_integer(name: str, value: Any, low: float, high: int | None = None) -> int:
    """Return the integer; raise TypeError for another type (floats and bools too), ValueError outside [low, high]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} is {shown(value)}; it must be an integer") from None
    if number < low or (high is not None and number > high):
        most = "" if high is None else f", at most {high}"
        raise ValueError(f"{name} is {shown(number)}; it must be at least {low}{most}")
    return number


def require_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise TypeError for anything but an int or a float, ValueError for NaN, infinities and, if asked, below zero."""
    if not isinstance(value, (int, float, np.floating, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}; it must be a number")
    size: Any = abs(value)
    if not size <= 1e18 or (positive and value <= 0):
        found = shown(value) if isinstance(value, int) else value
        raise ValueError(f"{name} is {found}; it must be {'positive and ' * positive}finite, at most 1e18")


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise TypeError for anything but a string, ValueError for one that is not among `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {shown(value)}; choose one of {tuple(choices)}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {tuple(choices)}")


def require_type(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError unless `value` is of `kind`, which messages call `what`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {shown(value)}; it must be {what}")


def require_flag(name: str, value: Any) -> None:
    """Raise TypeError for anything but True and False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} is {shown(value)}; it must be True or False")


def shown(value: Any) -> str:
    """Return a value as messages name it: its type where it is no plain value, because a tensor's would have to be
    read.
    """
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to spell very long ones
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.80}" if isinstance(value, (str, int, float, bytes, type(None))) else f"a {type(value).__name__}"
