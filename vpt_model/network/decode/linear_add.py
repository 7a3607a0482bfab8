"""Product and residual in one launch: the projections that end a layer's attention and its MLP.

x [M, K], weight [N, K], residual [M, N] → [M, N], all of one dtype, M = 1 … 8. Products are summed in float32 and
rounded once, behind the residual, where PyTorch rounds product and sum. Where the outputs alone are too few programs to
fill a GPU, K is split: each split writes its sums, and the one that is last to end, by a ticket, adds all of
them in the order of the splits, so that a result does not depend on who was last. One split writes no workspace.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.capture import on_device
from vpt_model.network.decode.products import (
    Launch,
    add_products,
    launch_of,
    load_rows,
    load_weights,
    no_products,
    prefetch_weights,
    sum_products,
)

PROGRAMS, STEPS = 512, 2
"""Programs that fill a GPU, four for each of an H100's multiprocessors, and steps below which a split has no use."""


@triton.jit(do_not_specialize=["rows"])
def linear_add_kernel(
    x,
    weight,
    residual,
    out,
    partials,
    tickets,
    rows,
    columns,
    outputs,
    share,
    splits,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, s) takes of the i-th block of outputs, of all rows, the s-th `share` of the columns."""
    block, split = tl.program_id(0), tl.program_id(1)
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * share
    end = tl.minimum(begin + share, columns)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch_weights(weight, output, outputs, begin, end, columns, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    total = no_products(ROWS, BLOCK_N, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = load_weights(weight, output, outputs, k, end, columns)
        total = add_products(total, load_rows(x, row, rows, k, end, columns), w, ROWS)
    sums = sum_products(total, ROWS)
    is_out = (row < rows)[:, None] & (output < outputs)[None, :]
    place = row[:, None] * outputs + output[None, :]
    is_last = True
    if splits > 1:
        tl.store(partials + split * rows * outputs + place, sums, mask=is_out)
        tl.debug_barrier()  # every thread's sums before the ticket, which hands them on
        is_last = tl.atomic_add(tickets + block, 1, sem="acq_rel") == splits - 1
        if is_last:
            sums = tl.zeros_like(sums)
            for s in range(splits):
                sums += tl.load(partials + s * rows * outputs + place, mask=is_out, other=0.0, cache_modifier=".cg")
            tl.store(tickets + block, 0)
    if is_last:
        sums += tl.load(residual + place, mask=is_out, other=0.0).to(tl.float32)
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=is_out)


def splits_of(launch: Launch, columns: int, outputs: int) -> int:
    """Return how many programs share one block of outputs; it depends on shapes alone, so a result does, too."""
    blocks = triton.cdiv(outputs, launch.outputs)
    return max(1, min(PROGRAMS // blocks, columns // (STEPS * launch.step)))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, tickets: Tensor) -> Tensor:
    """Return the sum described above; x and residual are contiguous. tickets: int32, at least N of them, 0 before and
    after.

    Workspace: float32 [splits, M, N] where there is more than one. Raises ValueError for more than 8 rows.
    """
    launch, (rows, columns), outputs = launch_of(x), x.shape, len(weight)
    splits = splits_of(launch, columns, outputs)
    share = triton.cdiv(triton.cdiv(columns, splits), launch.step) * launch.step
    splits = triton.cdiv(columns, share)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    partials = torch.empty((splits if splits > 1 else 0, rows, outputs), dtype=torch.float32, device=x.device)
    with on_device(x):
        linear_add_kernel[(triton.cdiv(outputs, launch.outputs), splits)](
            x,
            weight.contiguous(),
            residual,
            out,
            partials,
            tickets,
            rows,
            columns,
            outputs,
            share,
            splits,
            enable_fp_fusion=True,
            **launch.options(x),
        )
    return out
