"""Linear layers whose weights stay as they are stored, while their arithmetic is float32."""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_kernels.backends import bind, call
from vpt_kernels.checks import require_choice, require_disjoint, require_inference, require_tensor, require_type
from vpt_kernels.packed_linear.weights import PackedWeight

ACTIVATIONS = (None, "silu", "quick_gelu", "gelu", "gelu_tanh")
"""Names; the position of each is its number in the schema."""


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return activation(x·Wᵀ + bias) + residual; with a gated weight activation(gate)·up + residual.

    Products and sums are float32 whatever is stored, the result is rounded once to x's dtype.

    Args:
        x: [..., K] float32, bfloat16 or float16 (float64 on the reference), the last dimension contiguous.
        weight: from `pack_weight`, on x's device.
        bias: float32, one number per row of the weight ([N]; of a gated weight [2·N], the gate's first), contiguous.
        residual: [..., N] in x's dtype, the last dimension contiguous.
        activation: None, "silu", "quick_gelu" (x·σ(1.702·x)), "gelu" (by the error function) or "gelu_tanh". A gated
            weight needs one.
        out: [..., N] in x's dtype that takes the result. It may be `residual` itself and shares memory with nothing
            else.
        backend: "auto", "cpp" or "reference".

    Returns:
        [..., N] in x's dtype: a new contiguous tensor, or `out`. The same input gives the same bits with any number of
        threads.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, strides or devices do not fit, or memory overlaps; nothing has been written then.
        BackendUnavailable: An explicit backend cannot run here.

    Source: `torch.nn.functional.linear`.
    """
    require_type("weight", weight, PackedWeight, "a PackedWeight: call pack_weight(weight)")
    require_tensor("x", x, None, weight.data.device, None)
    if not x.dim() or x.shape[-1] != weight.in_features:
        raise ValueError(f"x is {tuple(x.shape)}; its last dimension must be the weight's {weight.in_features} columns")
    shape = (*x.shape[:-1], weight.out_features)
    rows = _rows("x", x, x.shape)
    bias = _bias(bias, weight, x)
    added = None if residual is None else _rows("residual", residual, shape, x)
    number = _activation(activation, weight.gated)
    require_inference(x=x, bias=bias, residual=residual)
    form = "packed_linear" if out is None else "packed_linear_into"
    op = bind("packed_linear", form, backend, x.device, x.dtype)
    packed = (weight.data, weight.scales, weight.minima, weight.out_features, weight.gated, weight.dynamic)
    arguments = (rows, *packed, bias, added, number)
    if out is None:
        return call(op, *arguments).view(shape)
    _rows("out", out, shape, x)
    require_inference(out=out)
    try:
        target = out.view(rows.shape[0], weight.out_features)
    except RuntimeError:
        raise ValueError(
            f"out has strides {out.stride()}; its rows must lie evenly apart: pass out.flatten(0, -2)"
        ) from None
    if op._overloadname == "reference":
        read = {"x": rows, "bias": bias, "data": weight.data, "scales": weight.scales, "minima": weight.minima}
        require_disjoint({"out": target}, {**read, "residual": added}, itself=("residual",))
    call(op, *arguments, target)
    return out


def _rows(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """Return `tensor`, which has `shape`, as rows [n, columns]."""
    if like is not None:
        require_tensor(name, tensor, like.dtype, like.device, None)
    if tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {tuple(shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; the last dimension must be contiguous")
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else _empty(tensor)


def _empty(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor without elements, which a reshape cannot count."""
    return tensor.new_empty(tensor.shape[:-1].numel(), tensor.shape[-1])


def _bias(bias: Tensor | None, weight: PackedWeight, x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    require_tensor("bias", bias, None, x.device, 1)
    if bias.dtype != torch.float32:
        raise TypeError(f"bias is {bias.dtype}; it must be torch.float32: convert it once, bias.float()")
    rows = weight.out_features * (2 if weight.gated else 1)
    if bias.shape[0] != rows or not bias.is_contiguous():
        raise ValueError(f"bias is {tuple(bias.shape)} with strides {bias.stride()}; it must be [{rows}], contiguous")
    return bias


def _activation(activation: str | None, gated: bool) -> int:
    if activation is not None:
        require_choice("activation", activation, ACTIVATIONS[1:])
    elif gated:
        raise ValueError(f"the weight is gated, and activation is None; choose one of {ACTIVATIONS[1:]}")
    return ACTIVATIONS.index(activation)
