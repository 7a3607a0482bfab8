"""Plain PyTorch in the published order: LayerNorm, linear map, score, rank-one update, each rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from vpt_kernels.library import CONV_KERNEL, implement

LAYER_NORM_EPS = 1e-5
"""The published projectors use the framework's default."""


def _features(
    features: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return f, [tokens, H]."""
    if weight is None:
        return features.flatten(0, -2)
    if features.dim() == 4:
        batch, channels, height, width = features.shape
        x = layer_norm(features.permute(0, 2, 3, 1), (channels,), norm_weight, norm_bias, LAYER_NORM_EPS)
        # [B, h/4, 4, w/4, 4, C] → tokens in row-major order, columns (ky, kx, c)
        side = CONV_KERNEL
        x = x.reshape(batch, height // side, side, width // side, side, channels).transpose(2, 3)
        return linear(x.reshape(-1, side * side * channels), weight, bias)
    x = layer_norm(features, (features.shape[-1],), norm_weight, norm_bias, LAYER_NORM_EPS)
    return linear(x.flatten(0, -2), weight, bias)


def control_cross_attention(
    features: Tensor,
    control: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_norm_weight: Tensor | None,
    feature_norm_bias: Tensor | None,
    feature_weight: Tensor | None,
    feature_bias: Tensor | None,
    condition_norm_weight: Tensor,
    condition_norm_bias: Tensor,
    condition_weight: Tensor,
    condition_bias: Tensor,
    *scores: Tensor | None,
) -> Tensor:
    f = _features(features, feature_norm_weight, feature_norm_bias, feature_weight, feature_bias)
    if control is None:
        return f.clone() if feature_weight is None else f
    normed = layer_norm(control, (control.shape[-1],), condition_norm_weight, condition_norm_bias, LAYER_NORM_EPS)
    k = linear(normed, condition_weight, condition_bias)
    if cu_seqlens is None:
        k = k.repeat_interleave(f.shape[0] // k.shape[0] if k.shape[0] else 0, 0)
    else:
        k = k.repeat_interleave(cu_seqlens.diff(), 0, output_size=f.shape[0])
    # Summed in float32 and rounded once, as the published einsum is.
    wide = torch.float64 if f.dtype == torch.float64 else torch.float32
    a = (f.to(wide) * k.to(wide)).sum(-1).to(f.dtype)
    return f + a[:, None] * k


def control_cross_attention_into(features: Tensor, *others: Any) -> None:
    *arguments, out, rows = others
    result = control_cross_attention(features, *arguments)
    valid = (rows >= 0) & (rows < out.shape[0])
    out[rows[valid]] = result[valid]


implement("control_cross_attention", "reference", control_cross_attention)
implement("control_cross_attention_into", "reference", control_cross_attention_into)
