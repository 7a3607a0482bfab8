"""RMSNorm, gate and up products and SiLU(gate) · up in one launch.

x [M, K], norm [K], weight [2 · I, K] with the gates' rows before the ups' → [M, I], all of one dtype, M = 1 … 8. The
norm rounds twice, as Qwen2-VL's; gate, up and their product stay in float32 and are rounded once, where PyTorch rounds
gate, up, SiLU and product: three errors less, and no value is read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.capture import on_device
from vpt_model.network.decode.products import (
    add_products,
    inverse_roots,
    launch_of,
    load_normed,
    load_weights,
    no_products,
    prefetch_weights,
    sum_products,
)


@triton.jit(do_not_specialize=["rows"])
def norm_swiglu_kernel(
    x,
    norm,
    weight,
    out,
    eps,
    rows,
    columns,
    outputs,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program i takes the i-th block of outputs, that is of gates and of ups, of all rows."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ups = weight + outputs.to(tl.int64) * columns
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch_weights(weight, output, outputs, 0, columns, columns, BLOCK_K)
        prefetch_weights(ups, output, outputs, 0, columns, columns, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    inverse = inverse_roots(x, row, rows, columns, eps, BLOCK_K)
    gates = no_products(ROWS, BLOCK_N, BLOCK_K)
    factors = no_products(ROWS, BLOCK_N, BLOCK_K)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        n = load_normed(x, norm, row, rows, k, columns, inverse)
        gates = add_products(gates, n, load_weights(weight, output, outputs, k, columns, columns), ROWS)
        factors = add_products(factors, n, load_weights(ups, output, outputs, k, columns, columns), ROWS)
    gate = sum_products(gates, ROWS)
    product = gate * tl.sigmoid(gate) * sum_products(factors, ROWS)
    place = out + row[:, None] * outputs + output[None, :]
    tl.store(place, product.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (output < outputs)[None, :])


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """Return the product described above. x is contiguous. Raises ValueError for more than 8 rows."""
    launch, (rows, columns), outputs = launch_of(x), x.shape, len(weight) // 2
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    with on_device(x):
        norm_swiglu_kernel[(triton.cdiv(outputs, launch.outputs),)](
            x,
            norm,
            weight.contiguous(),
            out,
            eps,
            rows,
            columns,
            outputs,
            enable_fp_fusion=True,
            **launch.options(x),
        )
    return out
