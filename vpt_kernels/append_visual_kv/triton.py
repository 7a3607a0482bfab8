"""One launch: a program rotates a few heads of a few tokens, and stores k and v where their slots say."""

from __future__ import annotations

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
    "many tokens": (8, 4),
}
"""Few tokens: as many programs as there are rows to fill the chip. Many: enough bytes per program to hide the index
loads, 8 tokens × 4 heads × 256 B = 8 KB in flight each. From reasoning about an H100, not from measurements."""
BLOCK_HEADS = 4


@triton.jit
def float8_bits(x):
    """uint8 of float8_e4m3fn: float32 saturated to ±448 and rounded to nearest even once; NaN stays NaN.

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
def _store_rows(cache, offset, mask, x, scale, heads, FLOAT8: tl.constexpr, HEAD_SCALES: tl.constexpr):
    """x [tokens, heads, channels] in any dtype to its rows, in the cache's dtype."""
    if FLOAT8:
        factor = tl.load(scale + (heads if HEAD_SCALES else heads * 0))[None, :, None]
        # A division rounded as IEEE says; the fast one, or a reciprocal, is off by one code once in thousands.
        tl.store(cache + offset, float8_bits(tl.div_rn(x.to(tl.float32), tl.broadcast_to(factor, x.shape))), mask=mask)
    else:
        tl.store(cache + offset, x.to(cache.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["tokens", "positions_axis", "positions_token", "slots_token"],
)
def append_kernel(
    q,
    q_out,
    k,
    v,
    table,
    positions,
    slots,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    tokens,
    table_rows,
    capacity,
    page_size,
    q_token,
    q_head,
    out_token,
    out_head,
    k_token,
    k_head,
    v_token,
    v_head,
    table_row,
    positions_axis,
    positions_token,
    slots_token,
    k_page,
    k_row,
    k_cache_head,
    v_page,
    v_row,
    v_cache_head,
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
    """Strides are named after the axis they step along, in elements."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < tokens
    i = tl.arange(0, BLOCK_HALF)
    if INTERLEAVED:
        axis = tl.where((i % 3 == 1) & (i < 3 * SECTION_H), 1, tl.where((i % 3 == 2) & (i < 3 * SECTION_W), 2, 0))
    else:
        axis = (i >= SECTION_T).to(tl.int32) + (i >= SECTION_T + SECTION_H).to(tl.int32)
    # [tokens, half]: the position that turns each half-dimension
    place = positions + axis.to(tl.int64)[None, :] * positions_axis + token[:, None] * positions_token
    is_pair = is_token[:, None] & (i < HALF)[None, :]
    position = tl.load(place, mask=is_pair, other=0).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), table_rows - 1)
    angle = table + position * table_row + i[None, :]
    cos = tl.load(angle, mask=is_pair, other=0.0)[:, None, :]
    sin = tl.load(angle + HALF, mask=is_pair, other=0.0)[:, None, :]

    rest = 2 * HALF + tl.arange(0, BLOCK_REST)
    # The first blocks of heads are q's, the others k's and v's.
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    if block < q_blocks:
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        is_row = is_token[:, None] & (head < Q_HEADS)[None, :]
        is_half = is_row[:, :, None] & (i < HALF)[None, None, :]
        row = (token[:, None] * q_token + head.to(tl.int64)[None, :] * q_head)[:, :, None]
        out = (token[:, None] * out_token + head.to(tl.int64)[None, :] * out_head)[:, :, None]
        first = tl.load(q + row + i[None, None, :], mask=is_half).to(tl.float32)
        second = tl.load(q + row + HALF + i[None, None, :], mask=is_half).to(tl.float32)
        tl.store(q_out + out + i[None, None, :], (first * cos - second * sin).to(q.dtype.element_ty), mask=is_half)
        tl.store(
            q_out + out + HALF + i[None, None, :], (second * cos + first * sin).to(q.dtype.element_ty), mask=is_half
        )
        if HEAD_DIM > 2 * HALF:
            is_rest = is_row[:, :, None] & (rest < HEAD_DIM)[None, None, :]
            tl.store(q_out + out + rest[None, None, :], tl.load(q + row + rest[None, None, :], mask=is_rest), is_rest)
    else:
        head = (block - q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        slot = tl.load(slots + token * slots_token, mask=is_token, other=-1).to(tl.int64)
        is_stored = (slot >= 0) & (slot < capacity)
        slot = tl.where(is_stored, slot, 0)
        is_row = is_stored[:, None] & (head < KV_HEADS)[None, :]
        is_half = is_row[:, :, None] & (i < HALF)[None, None, :]
        wide_head = head.to(tl.int64)[None, :]
        if PAGED:
            page = slot // page_size
            within = slot - page * page_size
            k_slot = page * k_page + within * k_row
            v_slot = page * v_page + within * v_row
        else:
            k_slot = slot * k_row
            v_slot = slot * v_row
        to_k = (k_slot[:, None] + wide_head * k_cache_head)[:, :, None]
        to_v = (v_slot[:, None] + wide_head * v_cache_head)[:, :, None]
        from_k = (token[:, None] * k_token + wide_head * k_head)[:, :, None]
        from_v = (token[:, None] * v_token + wide_head * v_head)[:, :, None]
        scale_head = tl.minimum(head, KV_HEADS - 1)
        first = tl.load(k + from_k + i[None, None, :], mask=is_half).to(tl.float32)
        second = tl.load(k + from_k + HALF + i[None, None, :], mask=is_half).to(tl.float32)
        channel = tl.arange(0, BLOCK_DIM)
        is_channel = is_row[:, :, None] & (channel < HEAD_DIM)[None, None, :]
        values = tl.load(v + from_v + channel[None, None, :], mask=is_channel)
        turned = first * cos - second * sin
        _store_rows(k_cache, to_k + i[None, None, :], is_half, turned, k_scale, scale_head, FLOAT8, K_HEAD_SCALES)
        turned = second * cos + first * sin
        _store_rows(
            k_cache, to_k + HALF + i[None, None, :], is_half, turned, k_scale, scale_head, FLOAT8, K_HEAD_SCALES
        )
        if HEAD_DIM > 2 * HALF:
            is_rest = is_row[:, :, None] & (rest < HEAD_DIM)[None, None, :]
            passed = tl.load(k + from_k + rest[None, None, :], mask=is_rest)
            _store_rows(
                k_cache, to_k + rest[None, None, :], is_rest, passed, k_scale, scale_head, FLOAT8, K_HEAD_SCALES
            )
        _store_rows(
            v_cache, to_v + channel[None, None, :], is_channel, values, v_scale, scale_head, FLOAT8, V_HEAD_SCALES
        )


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
            K_HEAD_SCALES=float8 and k_scale.numel() > 1,
            V_HEAD_SCALES=float8 and v_scale.numel() > 1,
            BLOCK_TOKENS=block_tokens,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
            BLOCK_DIM=triton.next_power_of_2(head_dim),
            num_warps=warps,
            # Products and sums are rounded one by one, as the C++ backend's are: both write the same bits.
            enable_fp_fusion=False,
        )


def append_visual_kv(q: Tensor, *others: object) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _launch(q, out, *others)
    return out


def append_visual_kv_(q: Tensor, *others: object) -> None:
    _launch(q, q, *others)


implement("append_visual_kv", "triton", append_visual_kv)
implement("append_visual_kv_", "triton", append_visual_kv_)
