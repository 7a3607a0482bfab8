"""Logits and the argmax token of every row in one launch.

x [M, K] (behind the final norm), weight [V, K] → logits float32 [M, V], rounded to x's dtype as the model's are, and
tokens int64 [M]: the lowest id on ties, −1 where a logit is NaN. Each program keeps the best of its outputs; the one
that is last to end, by a ticket, chooses among them, by comparisons alone, so that its order has no effect.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.capture import on_device
from vpt_model.network.decode.products import (
    add_products,
    launch_of,
    load_rows,
    load_weights,
    no_products,
    prefetch_weights,
    sum_products,
)

TILES, MERGED = 16, 1024
"""Blocks of outputs in one program, a thousand programs for a vocabulary; and of how many the best are read at once."""


@triton.jit
def best_of(values, ids):
    """Return each row's maximum [R, N] and its id, the lowest on ties; −1 at +inf where one is NaN or an id is −1."""
    is_bad = (values != values) | (ids < 0)
    top = tl.max(tl.where(is_bad, float("inf"), values), 1)
    # Of equal values the smallest id, and −1 is smaller than all.
    wanted = is_bad | (values == top[:, None])
    return top, tl.min(tl.where(is_bad, -1, tl.where(wanted, ids, 0x7FFFFFFF)), 1)


@triton.jit
def better_of(top, choice, other_top, other):
    """Return of two candidates per row the one that `best_of` both would give."""
    is_other = (other < 0) | ((choice >= 0) & ((other_top > top) | ((other_top == top) & (other < choice))))
    return tl.where(is_other, other_top, top), tl.where(is_other, other, choice)


@triton.jit(do_not_specialize=["rows"])
def head_kernel(
    x,
    weight,
    logits,
    tops,
    choices,
    tickets,
    tokens,
    rows,
    columns,
    outputs,
    programs,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Program i takes the i-th TILES blocks of outputs, of all rows."""
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    is_row = row < rows
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        output = program * TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        prefetch_weights(weight, output, outputs, 0, columns, columns, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    top = tl.full([ROWS], float("-inf"), tl.float32)
    choice = tl.full([ROWS], 0x7FFFFFFF, tl.int32)
    for tile in range(TILES):
        output = (program * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = no_products(ROWS, BLOCK_N, BLOCK_K)
        for start in range(0, columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = load_weights(weight, output, outputs, k, columns, columns)
            total = add_products(total, load_rows(x, row, rows, k, columns, columns), w, ROWS)
        is_output = (output < outputs)[None, :]
        rounded = sum_products(total, ROWS).to(x.dtype.element_ty).to(tl.float32)
        place = row[:, None].to(tl.int64) * outputs + output[None, :]
        tl.store(logits + place, rounded, mask=is_row[:, None] & is_output)
        ids = tl.where(is_output, output[None, :], 0x7FFFFFFF)
        higher, at = best_of(tl.where(is_output, rounded, float("-inf")), tl.broadcast_to(ids, rounded.shape))
        top, choice = better_of(top, choice, higher, at)
    tl.store(tops + row * programs + program, top, mask=is_row)
    tl.store(choices + row * programs + program, choice, mask=is_row)
    tl.debug_barrier()  # every thread's best before the ticket, which hands them on
    if tl.atomic_add(tickets, 1, sem="acq_rel") == programs - 1:
        for r in range(rows):
            best = tl.full([1], float("-inf"), tl.float32)
            token = tl.full([1], 0x7FFFFFFF, tl.int32)
            for begin in range(0, programs, MERGED):
                other = begin + tl.arange(0, MERGED)
                at, is_one = r * programs + other, other < programs
                values = tl.load(tops + at, mask=is_one, other=float("-inf"), cache_modifier=".cg")
                ids = tl.load(choices + at, mask=is_one, other=0x7FFFFFFF, cache_modifier=".cg")
                its_best, its_token = best_of(values[None, :], ids[None, :])
                best, token = better_of(best, token, its_best, its_token)
            tl.store(tokens + r + tl.arange(0, 1), token.to(tl.int64))
        tl.store(tickets, 0)


def head(x: Tensor, weight: Tensor, tickets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and tokens described above. x is contiguous. tickets: int32, 0 before and after.

    Workspace: 8 bytes per row and program. Raises ValueError for more than 8 rows.
    """
    launch, (rows, columns), outputs = launch_of(x), x.shape, len(weight)
    programs = triton.cdiv(outputs, launch.outputs * TILES)
    logits = torch.empty((rows, outputs), dtype=torch.float32, device=x.device)
    tops = torch.empty((rows, programs), dtype=torch.float32, device=x.device)
    choices = torch.empty((rows, programs), dtype=torch.int32, device=x.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=x.device)
    with on_device(x):
        head_kernel[(programs,)](
            x,
            weight.contiguous(),
            logits,
            tops,
            choices,
            tickets,
            tokens,
            rows,
            columns,
            outputs,
            programs,
            TILES=TILES,
            MERGED=MERGED,
            enable_fp_fusion=True,
            **launch.options(x),
        )
    return logits, tokens
