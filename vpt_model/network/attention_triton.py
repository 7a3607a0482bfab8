"""Attention over a cache whose lengths only the device knows, split along the keys: one launch.

The split of a block of queries that is last to end, by a ticket, merges all of them, in their order: a result does not
depend on who was last.

Written and interpreted on a CPU and compiled for sm_80 to sm_120; not yet run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.capture import on_device


class Launch(NamedTuple):
    """How a launch is divided: `rows` (query heads of tokens) in a program, `keys` a step, `split` a program."""

    rows: int
    keys: int
    split: int
    warps: int
    stages: int


DECODE = Launch(rows=16, keys=64, split=64, warps=4, stages=2)
APPEND = Launch(rows=64, keys=64, split=512, warps=8, stages=2)
FLOAT32 = Launch(rows=16, keys=64, split=128, warps=8, stages=1)
"""One token: its few heads fill a quarter of a tile and the time is that of reading the keys, so as many programs as
there are steps. Many tokens: enough programs without short splits, whose sums would have to be written and read again.
From reasoning about an H100, not from measurements."""


@triton.jit
def add_keys(top, total, mixed, scores, v):
    """Take one step of a softmax over keys: largest score and sum of each row [M], mixed values [M, D]; v [N, D]."""
    higher = tl.maximum(top, tl.max(scores, 1))
    # A query that sees none of these keys keeps -inf, which must not be subtracted from itself.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - base[:, None])
    fading = tl.exp2(top - base)
    mixed = mixed * fading[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, total * fading + tl.sum(p, 1), mixed


@triton.jit
def keep_split(sums, weights, row, top, total, mixed, d, dim, mask):
    """Keep what one split found, for whoever is last; row: [M] of the workspace. Every thread's before what follows."""
    tl.store(sums + row[:, None].to(tl.int64) * dim + d[None, :], mixed, mask=mask)
    tl.store(weights + row * 2, top)
    tl.store(weights + row * 2 + 1, total)
    tl.debug_barrier()


@triton.jit
def merge_splits(sums, weights, row, active, d, dim, mask, M: tl.constexpr, D: tl.constexpr):
    """Merge `active` splits in their order, `M` rows apart, read past L1: sums of weights [M], mixed values [M, D]."""
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D], tl.float32)
    for split in range(active):
        its = row + split * M
        its_top = tl.load(weights + its * 2, cache_modifier=".cg")
        its_total = tl.load(weights + its * 2 + 1, cache_modifier=".cg")
        at = sums + its[:, None].to(tl.int64) * dim + d[None, :]
        its_mixed = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, its_top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fading, share = tl.exp2(top - base), tl.exp2(its_top - base)
        total = total * fading + its_total * share
        mixed = mixed * fading[:, None] + its_mixed * share[:, None]
        top = higher
    return total, mixed


@triton.jit
def split_kernel(
    q,
    keys,
    values,
    starts,
    past,
    counts,
    out,
    sums,
    weights,
    tickets,
    scale,
    tokens,
    splits,
    capacity,
    q_row,
    q_token,
    q_head,
    key_slot,
    key_head,
    value_slot,
    value_head,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attend with a block of queries to one split of the keys; the last split of the block merges them all.

    The query heads of one key/value head are rows of one tile. Strides are named after the axis they step along.
    """
    group: tl.constexpr = Q_HEADS // KV_HEADS
    block, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    conversation, kv_head = pair // KV_HEADS, pair % KV_HEADS
    before = tl.load(past + conversation)
    padding = tokens - tl.load(counts + conversation)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // group, kv_head * group + row % group
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, tokens - 1)
    # Past the last key that a query of this block sees nothing is read: what lies there may be anything.
    seen = tl.minimum(before + last - padding + 1, capacity)
    seen = tl.where(last >= padding, seen, 0)
    active = tl.maximum((seen + SPLIT - 1) // SPLIT, 1)
    if split < active:
        d = tl.arange(0, BLOCK_D)
        is_d = d < HEAD_DIM
        is_real = (token >= padding) & (token < tokens)
        place = conversation.to(tl.int64) * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        x = tl.load(q + place[:, None] + d[None, :], mask=is_real[:, None] & is_d[None, :], other=0.0)  # [M, D]
        first = tl.load(starts + conversation).to(tl.int64)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, seen), BLOCK_N):
            key = n + tl.arange(0, BLOCK_N)
            slot = first + key
            is_key = key < seen
            at = keys + kv_head.to(tl.int64) * key_head + slot[None, :] * key_slot + d[:, None]
            k = tl.load(at, mask=is_key[None, :] & is_d[:, None], other=0.0)  # [D, N]
            scores = tl.dot(x, k, input_precision="ieee") * scale
            visible = is_key[None, :] & (key[None, :] <= before + (token - padding)[:, None])
            at = values + kv_head.to(tl.int64) * value_head + slot[:, None] * value_slot + d[None, :]
            v = tl.load(at, mask=is_key[:, None] & is_d[None, :], other=0.0)  # [N, D]
            top, total, mixed = add_keys(top, total, mixed, tl.where(visible, scores, float("-inf")), v)
        is_last = True
        if active > 1:
            of_block = pair * tl.num_programs(0) + block
            rows = of_block * splits * BLOCK_M + tl.arange(0, BLOCK_M)
            is_kept = is_real[:, None] & is_d[None, :]
            keep_split(sums, weights, rows + split * BLOCK_M, top, total, mixed, d, HEAD_DIM, is_kept)
            is_last = tl.atomic_add(tickets + of_block, 1, sem="acq_rel") == active - 1
            if is_last:
                total, mixed = merge_splits(sums, weights, rows, active, d, HEAD_DIM, is_kept, BLOCK_M, BLOCK_D)
                tl.store(tickets + of_block, 0)
        if is_last:
            mean = tl.where(is_real[:, None], mixed / tl.where(total != 0, total, 1.0)[:, None], 0.0)
            at = out + ((conversation.to(tl.int64) * tokens + token) * Q_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
            tl.store(at, mean.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & is_d[None, :])


def launch_of(dtype: torch.dtype, rows: int) -> Launch:
    """Return the launch for `rows` query rows (tokens times heads of a group) per key/value head."""
    if dtype == torch.float32:
        return FLOAT32
    return DECODE if rows <= DECODE.rows else APPEND


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    past: Tensor,
    counts: Tensor,
    capacity: int,
    tickets: Tensor | None = None,
) -> Tensor:
    """Do `vpt_model.network.attention.attend` on an NVIDIA GPU, with the same arguments and the same result.

    tickets: int32, one per token and head, 0 before and after; made here where none are given. Workspace: float32
    [R · Hkv, blocks, splits, rows, D + 2], splits = capacity / split; what is not needed is neither written nor read.
    The splits depend on nothing but the launch, so a result does not depend on the bucket or on the neighbours.
    """
    conversations, tokens, heads, dim = q.shape
    kv_heads = keys.shape[1]
    launch = launch_of(q.dtype, tokens * heads // kv_heads)
    splits, blocks = triton.cdiv(capacity, launch.split), triton.cdiv(tokens * heads // kv_heads, launch.rows)
    out = torch.empty((conversations, tokens, heads * dim), dtype=q.dtype, device=q.device)
    shape = (conversations * kv_heads, blocks, splits, launch.rows)
    sums = torch.empty((*shape, dim), dtype=torch.float32, device=q.device)
    weights = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    if tickets is None:
        tickets = torch.zeros(blocks * conversations * kv_heads, dtype=torch.int32, device=q.device)
    with on_device(q):
        split_kernel[(blocks, conversations * kv_heads, splits)](
            q,
            keys,
            values,
            starts,
            past,
            counts,
            out,
            sums,
            weights,
            tickets,
            dim**-0.5 * 1.4426950408889634,
            tokens,
            splits,
            capacity,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            Q_HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=dim,
            BLOCK_M=launch.rows,
            BLOCK_N=launch.keys,
            BLOCK_D=triton.next_power_of_2(dim),
            SPLIT=launch.split,
            num_warps=launch.warps,
            num_stages=launch.stages,
            enable_fp_fusion=True,
        )
    return out
