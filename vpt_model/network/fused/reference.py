"""The launches of this folder in PyTorch's operations, in any dtype and on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x if delta is None else x + delta
    return x, F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def add_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x if delta is None else x + delta
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps=eps)


def silu_mul(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def quick_gelu(x: Tensor) -> Tensor:
    return (1.702 * x).sigmoid_().mul_(x)


def rotate_packed(packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = packed.unbind(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate in the float32 of cos and sin, and round once."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
