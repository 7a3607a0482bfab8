"""M-RoPE, append and attention of one token of each conversation in one launch, split along the keys.

qkv [R, (Hq + 2 · Hkv) · D] as the projection leaves it → [R, Hq · D]; k and v go to row slots[r] of the caches
[slots, Hkv, D]; the caches' strides are free. positions [3, R]; starts, past, counts as in
`vpt_model.network.attention.attend`; a row with counts[r] = 0 is padding, gives 0 and stores nothing. Rotated q and k
are rounded as `append_visual_kv` rounds them, product by product, so the cache holds that operator's bits. The new
token's own key and value never leave the registers of the program that stores them; all others read the cache behind
it. One split goes straight to the output; of several the one that is last to end, by a ticket, merges all, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.attention_triton import add_keys, keep_split, merge_splits
from vpt_model.network.capture import on_device
from vpt_model.network.decode.products import overlaps

KEYS, SPLIT, WARPS, STAGES = 64, 64, 4, 2
"""Keys of one step, and of one program. Reading the keys is the time, so as many programs as there are steps."""
ROWS = 16
"""Query heads of a group in one tile, the smallest of the tensor cores."""


@triton.jit
def load_rotated_pair(x, cos, sin, pair, mask, HALF: tl.constexpr):
    """Return both halves of heads at x, rotated, in x's dtype."""
    first = tl.load(x + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit(do_not_specialize=["table_rows", "capacity", "room"])
def decode_attention_kernel(
    qkv,
    table,
    positions,
    slots,
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
    table_rows,
    splits,
    capacity,
    room,
    qkv_row,
    positions_axis,
    key_slot,
    key_head,
    value_slot,
    value_head,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (r · Hkv + h, s) takes the query heads of KV head h, of conversation r, over the s-th SPLIT keys."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    group: tl.constexpr = Q_HEADS // KV_HEADS
    dim: tl.constexpr = 2 * HALF
    dtype = qkv.dtype.element_ty
    place, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = place // KV_HEADS, place % KV_HEADS
    count = tl.load(counts + row)
    before = tl.minimum(tl.load(past + row), capacity - 1) * tl.minimum(count, 1)
    active = before // SPLIT + 1
    if split < active:
        pair = tl.arange(0, BLOCK_HALF)
        is_pair = pair < HALF
        d = tl.arange(0, 2 * BLOCK_HALF)
        is_d = d < dim
        axis = (pair >= SECTION_T).to(tl.int32) + (pair >= SECTION_T + SECTION_H).to(tl.int32)
        position = tl.load(positions + axis * positions_axis + row, mask=is_pair, other=0).to(tl.int64)
        angle = table + tl.minimum(tl.maximum(position, 0), table_rows - 1) * dim + pair
        cos = tl.load(angle, mask=is_pair, other=0.0)[None, :]
        sin = tl.load(angle + HALF, mask=is_pair, other=0.0)[None, :]
        packed = qkv + row.to(tl.int64) * qkv_row
        m = tl.arange(0, BLOCK_M)
        is_q = (m < group)[:, None] & is_pair[None, :]
        head = (kv_head * group + m)[:, None] * dim
        q_first, q_second = load_rotated_pair(packed + head, cos, sin, pair[None, :], is_q, HALF)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, 2 * BLOCK_HALF], tl.float32)
        first_slot = tl.load(starts + row).to(tl.int64)
        cached_keys = keys + kv_head.to(tl.int64) * key_head
        cached_values = values + kv_head.to(tl.int64) * value_head
        for n in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, before), BLOCK_N):
            key = n + tl.arange(0, BLOCK_N)
            is_key = key < before
            slot = first_slot + key
            at = cached_keys + slot[None, :] * key_slot + pair[:, None]
            is_k = is_pair[:, None] & is_key[None, :]
            k_first = tl.load(at, mask=is_k, other=0.0)  # [half, N]
            k_second = tl.load(at + HALF, mask=is_k, other=0.0)
            scores = tl.dot(q_first, k_first, input_precision="ieee")
            scores = tl.dot(q_second, k_second, scores, input_precision="ieee") * scale
            at = cached_values + slot[:, None] * value_slot + d[None, :]
            v = tl.load(at, mask=is_key[:, None] & is_d[None, :], other=0.0)  # [N, D]
            top, total, mixed = add_keys(top, total, mixed, tl.where(is_key[None, :], scores, float("-inf")), v)
        if split == active - 1:
            new = packed + (Q_HEADS + kv_head) * dim
            k_first, k_second = load_rotated_pair(new, cos, sin, pair[None, :], is_pair[None, :], HALF)
            v = tl.load(new + KV_HEADS * dim + d, mask=is_d, other=0.0)[None, :]
            slot = tl.load(slots + row).to(tl.int64)
            is_stored = (count > 0) & (slot >= 0) & (slot < room)
            slot = tl.where(is_stored, slot, 0)
            at = cached_keys + slot * key_slot + pair[None, :]
            tl.store(at, k_first, mask=is_stored & is_pair[None, :])
            tl.store(at + HALF, k_second, mask=is_stored & is_pair[None, :])
            tl.store(cached_values + slot * value_slot + d[None, :], v, mask=is_stored & is_d[None, :])
            score = tl.sum(q_first.to(tl.float32) * k_first.to(tl.float32), 1)
            score = (score + tl.sum(q_second.to(tl.float32) * k_second.to(tl.float32), 1)) * scale
            higher = tl.maximum(top, score)
            p = tl.exp2(score - higher)
            fading = tl.exp2(top - higher)
            total = total * fading + p
            mixed = mixed * fading[:, None] + p[:, None] * v.to(tl.float32)
            top = higher
        is_out = (m < group)[:, None] & is_d[None, :]
        is_last = True
        if active > 1:
            rows = place * splits * BLOCK_M + m
            keep_split(sums, weights, rows + split * BLOCK_M, top, total, mixed, d, dim, is_out)
            is_last = tl.atomic_add(tickets + place, 1, sem="acq_rel") == active - 1
            if is_last:
                total, mixed = merge_splits(sums, weights, rows, active, d, dim, is_out, BLOCK_M, 2 * BLOCK_HALF)
                tl.store(tickets + place, 0)
        if is_last:
            mean = tl.where(count > 0, mixed / total[:, None], 0.0)
            at = out + row.to(tl.int64) * (Q_HEADS * dim) + head + d[None, :]
            tl.store(at, mean.to(dtype), mask=is_out)


def attend(
    qkv: Tensor,
    table: Tensor,
    sections: tuple[int, int, int],
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    past: Tensor,
    counts: Tensor,
    capacity: int,
    tickets: Tensor,
) -> Tensor:
    """Return the attention described above. table: `rotary_table`'s, of D angles. tickets: int32, at least R · Hkv of
    them, 0 before and after.

    Workspace: float32 [R, Hkv, splits, 16, D + 2], splits = capacity / 64; what is not needed is not touched.
    """
    rows, (_, kv_heads, dim), pdl = len(qkv), keys.shape, overlaps(qkv)
    heads = qkv.shape[1] // dim - 2 * kv_heads
    splits = triton.cdiv(capacity, SPLIT)
    block = max(ROWS, triton.next_power_of_2(heads // kv_heads))
    out = torch.empty((rows, heads * dim), dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty((rows, kv_heads, splits, block, dim), dtype=torch.float32, device=qkv.device)
    weights = torch.empty((rows, kv_heads, splits, block, 2), dtype=torch.float32, device=qkv.device)
    with on_device(qkv):
        decode_attention_kernel[(rows * kv_heads, splits)](
            qkv,
            table,
            positions,
            slots,
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
            len(table),
            splits,
            capacity,
            len(keys),
            qkv.stride(0),
            positions.stride(0),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            Q_HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=dim // 2,
            SECTION_T=sections[0],
            SECTION_H=sections[1],
            PDL=pdl,
            BLOCK_M=block,
            BLOCK_N=KEYS,
            BLOCK_HALF=max(16, triton.next_power_of_2(dim // 2)),
            SPLIT=SPLIT,
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=False,
            launch_pdl=pdl,
        )
    return out
