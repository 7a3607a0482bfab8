"""Attention over a cache whose lengths only the device knows, split along the keys: two launches.

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
    """rows: of q in one program, a row being one query head of one token; keys: of one step; split: of one program."""

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
def split_kernel(
    q,
    keys,
    values,
    starts,
    past,
    counts,
    sums,
    weights,
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
    """Attention of a block of queries over one split of the keys, and its log2-sum-exp.

    The query heads of one key/value head are rows of one tile. Strides are named after the axis they step along.
    """
    group: tl.constexpr = Q_HEADS // KV_HEADS
    block, split = tl.program_id(0), tl.program_id(2)
    conversation = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    before = tl.load(past + conversation)
    count = tl.load(counts + conversation)
    padding = tokens - count
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // group, kv_head * group + row % group
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, tokens - 1)
    # Past the last key that a query of this block sees nothing is read: what lies there may be anything.
    seen = tl.minimum(before + last - padding + 1, capacity)
    begin = split * SPLIT
    if (begin < seen) & (last >= padding):
        d = tl.arange(0, BLOCK_D)
        is_real = (token >= padding) & (token < tokens)
        is_query = is_real[:, None] & (d < HEAD_DIM)[None, :]
        place = conversation.to(tl.int64) * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        x = tl.load(q + place[:, None] + d[None, :], mask=is_query, other=0.0)  # [M, D]
        first = tl.load(starts + conversation).to(tl.int64)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(begin, tl.minimum(begin + SPLIT, seen), BLOCK_N):
            key = n + tl.arange(0, BLOCK_N)
            slot = first + key
            is_key = key < seen
            at = keys + kv_head.to(tl.int64) * key_head + slot[None, :] * key_slot + d[:, None]
            k = tl.load(at, mask=is_key[None, :] & (d < HEAD_DIM)[:, None], other=0.0)  # [D, N]
            scores = tl.dot(x, k, input_precision="ieee") * scale
            visible = is_key[None, :] & (key[None, :] <= before + (token - padding)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A query that sees none of these keys keeps -inf, which must not be subtracted from itself.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(scores - base[:, None])
            fading = tl.exp2(top - base)
            at = values + kv_head.to(tl.int64) * value_head + slot[:, None] * value_slot + d[None, :]
            v = tl.load(at, mask=is_key[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # [N, D]
            total = total * fading + tl.sum(p, 1)
            mixed = mixed * fading[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            top = higher
        # Rows are [conversation, token, head, split]; what no split of a query wrote, the merge does not read.
        out = ((conversation.to(tl.int64) * tokens + token) * Q_HEADS + head) * splits + split
        # A sum that is NaN is written as such: the merge reads every split that it should have.
        sees = total != 0
        total = tl.where(sees, total, 1.0)
        mixed = mixed / total[:, None]
        tl.store(sums + out[:, None] * HEAD_DIM + d[None, :], mixed, mask=is_query)
        tl.store(weights + out, top + tl.log2(total), mask=is_real & sees)


@triton.jit
def merge_kernel(
    sums,
    weights,
    past,
    counts,
    out,
    tokens,
    splits,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One query head of one token: the mean of its splits, weighted by 2^weight; 0 for a token that is padding."""
    place, head = tl.program_id(0), tl.program_id(1)
    conversation, token = place // tokens, place % tokens
    row = place.to(tl.int64) * Q_HEADS + head
    padding = tokens - tl.load(counts + conversation)
    visible = tl.load(past + conversation) + token - padding + 1
    active = tl.minimum((visible + SPLIT - 1) // SPLIT, splits)
    active = tl.where(token >= padding, active, 0)
    s = tl.arange(0, BLOCK_SPLITS)
    exponents = tl.load(weights + row * splits + s, mask=s < active, other=float("-inf"))
    top = tl.max(exponents, 0)
    top = tl.where(active > 0, top, 0.0)
    total = tl.sum(tl.exp2(exponents - top), 0)
    d = tl.arange(0, BLOCK_D)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for n in range(active):
        share = tl.exp2(tl.load(weights + row * splits + n) - top)
        mean += share * tl.load(sums + (row * splits + n) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    mean = mean / tl.where(active > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + d, mean.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def launch_of(dtype: torch.dtype, rows: int) -> Launch:
    """Return the launch for `rows` query rows (tokens times heads of a group) per key/value head."""
    if dtype == torch.float32:
        return FLOAT32
    return DECODE if rows <= DECODE.rows else APPEND


def attend(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, past: Tensor, counts: Tensor, capacity: int
) -> Tensor:
    """`vpt_model.network.attention.attend` on an NVIDIA GPU: same arguments, same result.

    Workspace: float32 [R, N, Hq, splits, D + 1], splits = capacity / split; what is not needed is neither written nor
    read. The splits depend on nothing but the launch, so a result does not depend on the bucket or on the neighbours.
    """
    conversations, tokens, heads, dim = q.shape
    kv_heads = keys.shape[1]
    launch = launch_of(q.dtype, tokens * heads // kv_heads)
    splits = triton.cdiv(capacity, launch.split)
    out = torch.empty((conversations, tokens, heads * dim), dtype=q.dtype, device=q.device)
    sums = torch.empty((conversations, tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
    weights = torch.empty((conversations, tokens, heads, splits), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(tokens * heads // kv_heads, launch.rows), conversations * kv_heads, splits)
    with on_device(q):
        split_kernel[grid](
            q,
            keys,
            values,
            starts,
            past,
            counts,
            sums,
            weights,
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
        merge_kernel[(conversations * tokens, heads)](
            sums,
            weights,
            past,
            counts,
            out,
            tokens,
            splits,
            Q_HEADS=heads,
            HEAD_DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            SPLIT=launch.split,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out
