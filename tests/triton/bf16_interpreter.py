"""Makes Triton's interpreter compute bfloat16 by value, and float8 not at all. For tests only.

The interpreter keeps bfloat16 as uint16 in numpy, and its operations work on those integers: sums and products are
garbage, casts from float32 truncate. Here casts round to nearest even and products of matrices widen to float32, as
the tensor cores do; whatever else would compute with the integers raises, so that a kernel cannot pass by accident.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)

_BIT_OPERATIONS = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def widen(stored: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 numbers stored as uint16."""
    return (stored.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """uint16 bfloat16 numbers, rounded to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _kind(thing: object) -> tl.dtype:
    return getattr(thing, "dtype", thing).scalar


def _numpy_cast(src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, *rounding: object) -> TensorHandle:
    source, target = _kind(src), dst_type.scalar
    if any(kind.is_floating() and kind.primitive_bitwidth == 8 for kind in (source, target)):
        raise NotImplementedError("the interpreter rounds float8 wrongly: compute its bits in integers")
    if source == target or tl.bfloat16 not in (source, target):
        return _numpy_cast(src, dst_type)
    if source == tl.bfloat16:
        return _numpy_cast(TensorHandle(widen(src.data), tl.float32), dst_type)
    return TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)


def _dot(original: Callable) -> Callable:
    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (TensorHandle(widen(x.data), tl.float32) if _kind(x) == tl.bfloat16 else x for x in (a, b))
        return original(self, a, b, d, input_precision, max_num_imprecise_acc)

    return dot


def _refuse(name: str, original: Callable) -> Callable:
    """Operands first, the numpy function last; selecting and bit operations move bits, which is right."""

    def checked(self, *arguments):
        *operands, function = arguments
        moves_bits = function is np.where or function in _BIT_OPERATIONS
        if not moves_bits and any(_kind(x) == tl.bfloat16 for x in operands):
            raise NotImplementedError(f"{name} of bfloat16 under the interpreter: convert to float32 first")
        return original(self, *arguments)

    return checked


def _splat(original: Callable) -> Callable:
    def splat(self, ret_ty, arg):
        """Triton 3.9 makes a comparison's outcome, a truth value, an integer of what was compared."""
        made = original(self, ret_ty, arg)
        return TensorHandle(made.data.astype(np.bool_), made.dtype) if arg.data.dtype == np.bool_ else made

    return splat


def _apply(original: Callable) -> Callable:
    def apply(self, inputs):
        for tensor in inputs if isinstance(inputs, tuple) else (inputs,):
            if tensor.dtype.scalar == tl.bfloat16:
                raise NotImplementedError("reduction of bfloat16 under the interpreter: convert to float32 first")
        return original(self, inputs)

    return apply


def _restore(original: Callable) -> Callable:
    def restore(self, args_dev, args_hst, kwargs, kwargs_hst):
        """CPU tensors are worked on in place; copying a storage onto itself would touch every page of it."""
        if any(getattr(x, "is_cuda", False) for x in (*args_dev, *kwargs.values())):
            original(self, args_dev, args_hst, kwargs, kwargs_hst)

    return restore


_patched: set[str] = set()
executed: set[str] = set()
"""Names of the kernels and device functions that have run in this process."""


def _call(self: InterpretedFunction, *arguments: object, **named: object) -> object:
    """A device function. Replacing triton.language costs milliseconds: once per module and launch, not per call."""
    executed.add(self.fn.__name__)
    if self.fn.__module__ not in _patched:
        _patched.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


def _launch(original: Callable) -> Callable:
    def launch(self, *arguments, **named):
        _patched.clear()
        executed.add(self.fn.__name__)
        return original(self, *arguments, **named)

    return launch


def install() -> None:
    """Change the interpreter of this process; a second call changes nothing."""
    if InterpreterBuilder.cast_impl is _cast:
        return
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_to_fp = _cast
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.create_splat = _splat(InterpreterBuilder.create_splat)
    for name in ("binary_op", "ternary_op", "unary_op"):
        setattr(InterpreterBuilder, name, _refuse(name, getattr(InterpreterBuilder, name)))
    InterpretedFunction.__call__ = _call
    GridExecutor.__call__ = _launch(GridExecutor.__call__)
    ReduceScanOpInterface.apply = _apply(ReduceScanOpInterface.apply)
    GridExecutor._restore_args_dev = _restore(GridExecutor._restore_args_dev)
