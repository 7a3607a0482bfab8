"""A residual sum and the norm behind it, one program a row: each row is read once and both results are written once.

x, delta [M, H] → x + delta, rounded to x's dtype as PyTorch rounds it, and the norm of that rounded sum. RMSNorm rounds
before its weight, as Qwen2-VL's; LayerNorm rounds once. Means are float32, over the whole row in registers. Without a
delta x is not written again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.capture import on_device

WARPS = 8
"""A row of 768 to 3,584 channels: 4 to 16 values a thread."""


@triton.jit
def load_sum(x, delta, out, place, mask):
    """Return x + delta rounded to x's dtype and kept in `out`, as float32; x itself where delta is None."""
    total = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if delta is not None:
        rounded = (total + tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(out + place, rounded, mask=mask)
        total = rounded.to(tl.float32)
    return total


@triton.jit
def add_rms_norm_kernel(x, delta, weight, out, normed, eps, columns, BLOCK: tl.constexpr):
    """Program i takes row i."""
    column = tl.arange(0, BLOCK)
    mask = column < columns
    place = tl.program_id(0).to(tl.int64) * columns + column
    total = load_sum(x, delta, out, place, mask)
    inverse = tl.rsqrt(tl.sum(total * total, 0) / columns + eps)
    dtype = x.dtype.element_ty
    scaled = (total * inverse).to(dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + place, (scaled * factor).to(dtype), mask=mask)


@triton.jit
def add_layer_norm_kernel(x, delta, weight, bias, out, normed, eps, columns, BLOCK: tl.constexpr):
    """Program i takes row i."""
    column = tl.arange(0, BLOCK)
    mask = column < columns
    place = tl.program_id(0).to(tl.int64) * columns + column
    total = load_sum(x, delta, out, place, mask)
    deviation = tl.where(mask, total - tl.sum(total, 0) / columns, 0.0)
    # What rounding the mean took off every deviation, which counts where the mean is large against them.
    deviation = tl.where(mask, deviation - tl.sum(deviation, 0) / columns, 0.0)
    inverse = tl.rsqrt(tl.sum(deviation * deviation, 0) / columns + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + place, (deviation * inverse * factor + shift).to(x.dtype.element_ty), mask=mask)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta and its norm; x and delta have one shape [M, H]."""
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    out, normed = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    if rows:
        with on_device(x):
            add_rms_norm_kernel[(rows,)](
                x,
                delta,
                weight,
                out,
                normed,
                eps,
                columns,
                BLOCK=triton.next_power_of_2(columns),
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return out, normed


def add_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta and its norm; x and delta have one shape [M, H]."""
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    out, normed = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    if rows:
        with on_device(x):
            add_layer_norm_kernel[(rows,)](
                x,
                delta,
                weight,
                bias,
                out,
                normed,
                eps,
                columns,
                BLOCK=triton.next_power_of_2(columns),
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return out, normed
