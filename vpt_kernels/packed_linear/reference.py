"""Plain PyTorch: the panels' rows in float32, F.linear, and what follows it; rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_kernels.library import implement
from vpt_kernels.packed_linear.weights import PackedWeight

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    F.silu,
    lambda x: x * torch.sigmoid(1.702 * x),
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
)
"""In the order of `ACTIVATIONS` in api.py."""


def packed_linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    minima: Tensor | None,
    features: int,
    gated: bool,
    dynamic: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = PackedWeight(data, scales, x.shape[1], features, gated, minima).dequantize(wide)
    product = F.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
    if gated:
        gate, up = product.chunk(2, -1)
        product = _ACTIVATIONS[activation](gate) * up
    else:
        product = _ACTIVATIONS[activation](product)
    return (product if residual is None else product + residual).to(x.dtype)


def packed_linear_into(*arguments: Any) -> None:
    *inputs, out = arguments
    out.copy_(packed_linear(*inputs))


implement("packed_linear", "reference", packed_linear)
implement("packed_linear_into", "reference", packed_linear_into)
