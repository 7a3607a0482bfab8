"""RMSNorm, product and bias in one launch: the queries, keys and values of a layer.

x [M, K], norm [K], weight [N, K], bias [N] → [M, N], all of one dtype, M = 1 … 8. The norm rounds twice, as Qwen2-VL's;
products are summed in float32 and rounded once, behind the bias. Every program normalises all of x, which costs a
read of M · K values from L2 where it reads `outputs` · K of weights from memory.
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
def norm_linear_kernel(
    x,
    norm,
    weight,
    bias,
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
    """Program i takes the i-th block of outputs, of all rows."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch_weights(weight, output, outputs, 0, columns, columns, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    inverse = inverse_roots(x, row, rows, columns, eps, BLOCK_K)
    total = no_products(ROWS, BLOCK_N, BLOCK_K)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = load_weights(weight, output, outputs, k, columns, columns)
        total = add_products(total, load_normed(x, norm, row, rows, k, columns, inverse), w, ROWS)
    is_output = output < outputs
    sums = sum_products(total, ROWS) + tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    place = out + row[:, None] * outputs + output[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & is_output[None, :])


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the product described above. x is contiguous. Raises ValueError for more than 8 rows."""
    launch, (rows, columns), outputs = launch_of(x), x.shape, len(weight)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    with on_device(x):
        norm_linear_kernel[(triton.cdiv(outputs, launch.outputs),)](
            x,
            norm,
            weight.contiguous(),
            bias,
            out,
            eps,
            rows,
            columns,
            outputs,
            enable_fp_fusion=True,
            **launch.options(x),
        )
    return out
