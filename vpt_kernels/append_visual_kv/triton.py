"""One launch: a program normalises and rotates a few heads of a few tokens; k and v go where the slots say."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_kernels.launch import on_device, tuned
from vpt_kernels.library import implement

SIZES = (("few tokens", 64), ("some tokens", 2048), ("many tokens", None))
"""Size classes and the most tokens of each."""
LAUNCHES = {
    # BLOCK_TOKENS, num_warps
    "few tokens": (1, 1),
    "some tokens": (2, 2),
    "many tokens": (8, 8),
}
"""Few tokens: as many programs as there are rows to fill the chip. Many: enough bytes per program to hide the index
loads, 8 tokens × 4 heads × 256 B = 8 KB in flight each. From reasoning about an H100, not from measurements."""
BLOCK_HEADS = 4


@triton.jit
def float8_bits(x):
    """Return x, float32, as uint8 of float8_e4m3fn: saturated to ±448, rounded to nearest even once; NaN stays NaN.

    In integers, the arithmetic of csrc/math/rounding.h: the same bits on every architecture, with and without float8 in
    hardware.
    """
    u = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(u & 0x7FFFFFFF, 0x43E00000)
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # Adding 2^14 moves a subnormal's bits to the bottom of the mantissa, rounded by the addition.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    rounded = tl.where(magnitude < (121 << 23), subnormal, normal)
    rounded = tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7F, rounded)
    return (rounded | ((u >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_rows(cache_ptr, offset, mask, x, scale_ptr, heads, FLOAT8: tl.constexpr, HEAD_SCALES: tl.constexpr):
    """Store x [tokens, heads, channels] in any dtype in its rows, in the cache's dtype."""
    if FLOAT8:
        factor = tl.load(scale_ptr + (heads if HEAD_SCALES else heads * 0))[None, :, None]
        # A division rounded as IEEE says; the fast one, or a reciprocal, is off by one code once in thousands.
        quotient = tl.div_rn(x.to(tl.float32), tl.broadcast_to(factor, x.shape))
        tl.store(cache_ptr + offset, float8_bits(quotient), mask=mask)
    else:
        tl.store(cache_ptr + offset, x.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def apply_norm(x, inverse, norm_ptr, channel, mask):
    """Return weight · (x / √(mean square)) in x's dtype, rounded after each step as transformers' RMSNorm does."""
    weight = tl.load(norm_ptr + channel, mask=mask, other=0.0).to(tl.float32)[None, None, :]
    normed = (x.to(tl.float32) * inverse).to(x.dtype).to(tl.float32)
    return (weight * normed).to(x.dtype)


@triton.jit
def load_rotated(
    x_ptr,
    offset,
    row_mask,
    cos,
    sin,
    norm_ptr,
    norm_eps,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Load heads [tokens, heads] at x_ptr + offset: rotated halves in float32, what is behind them in x's dtype."""
    pair = tl.arange(0, BLOCK_HALF)
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)
    pair_mask = row_mask[:, :, None] & (pair < HALF)[None, None, :]
    rest_mask = row_mask[:, :, None] & (rest < HEAD_DIM)[None, None, :]
    row_ptr = x_ptr + offset[:, :, None]
    first = tl.load(row_ptr + pair[None, None, :], mask=pair_mask, other=0.0)
    second = tl.load(row_ptr + HALF + pair[None, None, :], mask=pair_mask, other=0.0)
    passed = tl.load(row_ptr + rest[None, None, :], mask=rest_mask, other=0.0)
    if NORM:
        low, high, behind = first.to(tl.float32), second.to(tl.float32), passed.to(tl.float32)
        squares = tl.sum(low * low + high * high, 2) + tl.sum(behind * behind, 2)
        root = tl.sqrt_rn(squares / HEAD_DIM + norm_eps)
        inverse = tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)[:, :, None]
        first = apply_norm(first, inverse, norm_ptr, pair, pair < HALF)
        second = apply_norm(second, inverse, norm_ptr, HALF + pair, pair < HALF)
        passed = apply_norm(passed, inverse, norm_ptr, rest, rest < HEAD_DIM)
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin, passed


@triton.jit(
    do_not_specialize=["tokens", "norm_eps", "stride_positions_axis", "stride_positions_token", "stride_slots_token"],
)
def append_kernel(
    q_ptr,
    q_out_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_norm_ptr,
    k_norm_ptr,
    norm_eps,
    tokens,
    table_rows,
    capacity,
    page_size,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_table_row,
    stride_positions_axis,
    stride_positions_token,
    stride_slots_token,
    stride_k_cache_page,
    stride_k_cache_row,
    stride_k_cache_head,
    stride_v_cache_page,
    stride_v_cache_row,
    stride_v_cache_head,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGED: tl.constexpr,
    FLOAT8: tl.constexpr,
    K_HEAD_SCALES: tl.constexpr,
    V_HEAD_SCALES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Program (i, j) takes the i-th tokens, and of them the j-th heads of q or, behind those, of k and v."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_mask = token < tokens
    pair = tl.arange(0, BLOCK_HALF)
    if INTERLEAVED:
        of_height = (pair % 3 == 1) & (pair < 3 * SECTION_H)
        axis = tl.where(of_height, 1, tl.where((pair % 3 == 2) & (pair < 3 * SECTION_W), 2, 0))
    else:
        axis = (pair >= SECTION_T).to(tl.int32) + (pair >= SECTION_T + SECTION_H).to(tl.int32)
    # [tokens, half]: the position that rotates each pair of channels
    position_ptr = positions_ptr + axis.to(tl.int64)[None, :] * stride_positions_axis
    angle_mask = token_mask[:, None] & (pair < HALF)[None, :]
    position = tl.load(position_ptr + token[:, None] * stride_positions_token, mask=angle_mask, other=0).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), table_rows - 1)
    angle_ptr = table_ptr + position * stride_table_row + pair[None, :]
    cos = tl.load(angle_ptr, mask=angle_mask, other=0.0)[:, None, :]
    sin = tl.load(angle_ptr + HALF, mask=angle_mask, other=0.0)[:, None, :]

    rest = 2 * HALF + tl.arange(0, BLOCK_REST)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    if block < q_blocks:
        head = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[None, :]
        row_mask = token_mask[:, None] & (head < Q_HEADS)
        first, second, passed = load_rotated(
            q_ptr,
            token[:, None] * stride_q_token + head * stride_q_head,
            row_mask,
            cos,
            sin,
            q_norm_ptr,
            norm_eps,
            q_norm_ptr is not None,
            HEAD_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
        )
        pair_mask = row_mask[:, :, None] & (pair < HALF)[None, None, :]
        out_ptr = q_out_ptr + (token[:, None] * stride_out_token + head * stride_out_head)[:, :, None]
        dtype = q_out_ptr.dtype.element_ty
        tl.store(out_ptr + pair[None, None, :], first.to(dtype), mask=pair_mask)
        tl.store(out_ptr + HALF + pair[None, None, :], second.to(dtype), mask=pair_mask)
        if HEAD_DIM > 2 * HALF:
            rest_mask = row_mask[:, :, None] & (rest < HEAD_DIM)[None, None, :]
            tl.store(out_ptr + rest[None, None, :], passed, mask=rest_mask)
    else:
        number = (block - q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        head = number.to(tl.int64)[None, :]
        slot = tl.load(slots_ptr + token * stride_slots_token, mask=token_mask, other=-1).to(tl.int64)
        is_stored = (slot >= 0) & (slot < capacity)
        slot = tl.where(is_stored, slot, 0)
        row_mask = is_stored[:, None] & (head < KV_HEADS)
        first, second, passed = load_rotated(
            k_ptr,
            token[:, None] * stride_k_token + head * stride_k_head,
            row_mask,
            cos,
            sin,
            k_norm_ptr,
            norm_eps,
            k_norm_ptr is not None,
            HEAD_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
        )
        if PAGED:
            page = slot // page_size
            within = slot - page * page_size
            k_slot = page * stride_k_cache_page + within * stride_k_cache_row
            v_slot = page * stride_v_cache_page + within * stride_v_cache_row
        else:
            k_slot = slot * stride_k_cache_row
            v_slot = slot * stride_v_cache_row
        k_row = (k_slot[:, None] + head * stride_k_cache_head)[:, :, None]
        v_row = (v_slot[:, None] + head * stride_v_cache_head)[:, :, None]
        scale_head = tl.minimum(number, KV_HEADS - 1)
        pair_mask = row_mask[:, :, None] & (pair < HALF)[None, None, :]
        k_pair = k_row + pair[None, None, :]
        store_rows(k_cache_ptr, k_pair, pair_mask, first, k_scale_ptr, scale_head, FLOAT8, K_HEAD_SCALES)
        store_rows(k_cache_ptr, k_pair + HALF, pair_mask, second, k_scale_ptr, scale_head, FLOAT8, K_HEAD_SCALES)
        if HEAD_DIM > 2 * HALF:
            rest_mask = row_mask[:, :, None] & (rest < HEAD_DIM)[None, None, :]
            k_rest = k_row + rest[None, None, :]
            store_rows(k_cache_ptr, k_rest, rest_mask, passed, k_scale_ptr, scale_head, FLOAT8, K_HEAD_SCALES)
        channel = tl.arange(0, BLOCK_DIM)
        channel_mask = row_mask[:, :, None] & (channel < HEAD_DIM)[None, None, :]
        v_from = token[:, None] * stride_v_token + head * stride_v_head
        values = tl.load(v_ptr + v_from[:, :, None] + channel[None, None, :], mask=channel_mask)
        v_channel = v_row + channel[None, None, :]
        store_rows(v_cache_ptr, v_channel, channel_mask, values, v_scale_ptr, scale_head, FLOAT8, V_HEAD_SCALES)


def _launch(
    q: Tensor,
    q_out: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    section_t: int,
    section_h: int,
    section_w: int,
    interleaved: bool,
    heads_first: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> None:
    tokens, q_heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    if not tokens:
        return
    row, head = (-2, -3) if heads_first else (-3, -2)
    paged = k_cache.dim() == 4
    # An empty page must not make the kernel divide by zero; its capacity is 0 whatever it divides by.
    page_size = max(1, k_cache.shape[row])
    float8 = k_scale is not None
    size = next(name for name, most in SIZES if most is None or tokens <= most)
    block_tokens, warps = tuned(q, "append_kernel", size, LAUNCHES[size])
    grid = (
        triton.cdiv(tokens, block_tokens),
        triton.cdiv(q_heads, BLOCK_HEADS) + triton.cdiv(kv_heads, BLOCK_HEADS),
    )
    with on_device(q):
        append_kernel[grid](
            q,
            q_out,
            k,
            v,
            cos_sin,
            positions,
            slots,
            k_cache.view(torch.uint8) if float8 else k_cache,
            v_cache.view(torch.uint8) if float8 else v_cache,
            k_scale,
            v_scale,
            q_norm,
            k_norm,
            norm_eps,
            tokens,
            cos_sin.shape[0],
            k_cache.shape[row] * (k_cache.shape[0] if paged else 1),
            page_size,
            q.stride(0),
            q.stride(1),
            q_out.stride(0),
            q_out.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            cos_sin.stride(0),
            positions.stride(0),
            positions.stride(1),
            slots.stride(0),
            k_cache.stride(0) if paged else 0,
            k_cache.stride(row),
            k_cache.stride(head),
            v_cache.stride(0) if paged else 0,
            v_cache.stride(row),
            v_cache.stride(head),
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            HALF=half,
            SECTION_T=section_t,
            SECTION_H=section_h,
            SECTION_W=section_w,
            INTERLEAVED=interleaved,
            PAGED=paged,
            FLOAT8=float8,
            K_HEAD_SCALES=k_scale is not None and k_scale.numel() > 1,
            V_HEAD_SCALES=v_scale is not None and v_scale.numel() > 1,
            BLOCK_TOKENS=block_tokens,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
            BLOCK_DIM=triton.next_power_of_2(head_dim),
            num_warps=warps,
            # Products and sums are rounded one by one, as the C++ backend's are: both write the same bits.
            enable_fp_fusion=False,
        )


def append_visual_kv(q: Tensor, *others: Any) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _launch(q, out, *others)
    return out


def append_visual_kv_(q: Tensor, *others: Any) -> None:
    _launch(q, q, *others)


implement("append_visual_kv", "triton", append_visual_kv)
implement("append_visual_kv_", "triton", append_visual_kv_)
