"""SiLU(gate) · up and quick GELU, each one pass: every value is read once, computed in float32 and rounded once, where
PyTorch's operations round SiLU, or the factor and its sigmoid, as well."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.capture import on_device

BLOCK, WARPS = 1024, 4
"""8 values a thread: 16 bytes of bfloat16."""


@triton.jit
def silu_mul_kernel(packed, out, columns, BLOCK: tl.constexpr):
    """Program (i, j) takes of row i the j-th block of columns."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    row = tl.program_id(0).to(tl.int64) * columns
    gate = tl.load(packed + 2 * row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(packed + 2 * row + columns + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def quick_gelu_kernel(x, columns, BLOCK: tl.constexpr):
    """Program (i, j) takes of row i the j-th block of columns, in place."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    place = tl.program_id(0).to(tl.int64) * columns + column
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + place, (value * tl.sigmoid(1.702 * value)).to(x.dtype.element_ty), mask=mask)


def silu_mul(packed: Tensor) -> Tensor:
    """Return [M, I] of packed gates and ups [M, 2 · I]."""
    packed = packed.contiguous()
    rows, columns = len(packed), packed.shape[1] // 2
    out = torch.empty((rows, columns), dtype=packed.dtype, device=packed.device)
    if rows:
        with on_device(packed):
            silu_mul_kernel[(rows, triton.cdiv(columns, BLOCK))](
                packed, out, columns, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )
    return out


def quick_gelu_(x: Tensor) -> Tensor:
    """Write the gate over x [M, I], a contiguous tensor."""
    rows, columns = x.shape
    if rows:
        with on_device(x):
            quick_gelu_kernel[(rows, triton.cdiv(columns, BLOCK))](
                x, columns, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )
    return x
