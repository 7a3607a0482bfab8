"""Two launches: k, u and β of every image by one GEMV, then a GEMM that normalises as it reads and ends in rank one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_kernels.control_cross_attention.triton_condition import EPS, Condition, conditions, merge_moments
from vpt_kernels.launch import capability, on_device, tuned
from vpt_kernels.library import CONV_KERNEL, implement

GEMM_LAUNCHES = {
    # BLOCK_M tokens, BLOCK_N outputs, BLOCK_K channels, num_warps, num_stages
    "short steps": (64, 64, 32, 8, 2),
    "few tokens": (64, 64, 64, 4, 3),
    "many tokens": (128, 128, 64, 8, 3),
}
"""Up to MANY_TOKENS − 1 tokens: one DINOv2 or SAM image (256 tokens) gives 96 programs of 64×64 at H = 1536, of
128×128 only 24 for 132 multiprocessors. Short steps where registers are short: float32, whose IEEE products run on the
ordinary cores, and the conv form, whose channels are gathered through 64-bit addresses.
From reasoning about an H100, not from measurements."""
MANY_TOKENS = 1024
IDENTITY_LAUNCHES = {
    # BLOCK_M tokens, num_warps
    "narrow": (1, 8),
    "wide": (1, 16),
}
"""Up to NARROW channels, up to WIDEST. One program per token: 256 of them fill the chip, and no row waits for another.
"""
NARROW, WIDEST = 2048, 16384

KERNEL = tl.constexpr(CONV_KERNEL)


@triton.jit
def _image_of(token, per_image, cu_seqlens_ptr, stride_cu_seqlens, images, steps, RAGGED: tl.constexpr):
    """Return the image of each token: the last one that begins at or before it."""
    if RAGGED:
        low = token * 0
        high = low + images
        for _ in range(steps):
            middle = (low + high) // 2
            begins = tl.load(cu_seqlens_ptr + middle * stride_cu_seqlens).to(tl.int64) <= token
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle)
        return low
    else:
        return token // per_image


@triton.jit
def _features(row_ptr, channel, group, stride_x_channel, stride_x_height, stride_x_width, mask, CONV: tl.constexpr):
    """Return the tokens' LayerNorm group (ky, kx), or their rows, float32 [tokens, channels]."""
    if CONV:
        cell = tl.cast(group, tl.int64)
        row_ptr += cell // KERNEL * stride_x_height + cell % KERNEL * stride_x_width
        channel_ptr = row_ptr[:, None] + channel.to(tl.int64)[None, :] * stride_x_channel
    else:
        channel_ptr = row_ptr[:, None] + channel[None, :]
    return tl.load(channel_ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["tokens", "per_image", "images", "steps", "stride_cu_seqlens", "stride_rows_token", "out_rows"]
)
def project_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    condition_ptr,
    cu_seqlens_ptr,
    rows_ptr,
    out_ptr,
    tokens,
    per_image,
    images,
    steps,
    hidden,
    cells_across,
    stride_x_image,
    stride_x_token,
    stride_x_channel,
    stride_x_height,
    stride_x_width,
    stride_condition_image,
    stride_cu_seqlens,
    stride_rows_token,
    out_rows,
    stride_out_row,
    CHANNELS: tl.constexpr,
    CONV: tl.constexpr,
    RAGGED: tl.constexpr,
    CONDITIONED: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
    SCATTER: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write out[row of token] = f + (LN(x)·u + β)·k, f = LN(x)·Wᵀ + b; at condition_ptr: k, u, β of every image."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < tokens
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < hidden
    groups: tl.constexpr = KERNEL * KERNEL if CONV else 1
    chunks: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    image = _image_of(token, per_image, cu_seqlens_ptr, stride_cu_seqlens, images, steps, RAGGED)
    if CONV:
        cell = token % per_image
        first_y, first_x = cell // cells_across * KERNEL, cell % cells_across * KERNEL
        base = image * stride_x_image + first_y * stride_x_height + first_x * stride_x_width
    elif RAGGED:
        base = token * stride_x_token
    else:
        base = (token // per_image) * stride_x_image + (token % per_image) * stride_x_token
    x_row_ptr = x_ptr + base

    # The moments of all groups before the GEMM: this part needs nothing from the launch before.
    group_index = tl.arange(0, groups)[None, :]
    means = tl.zeros((BLOCK_M, groups), tl.float32)
    inverses = tl.zeros((BLOCK_M, groups), tl.float32)
    for group in range(groups):
        mean = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        count = 0.0
        for chunk in tl.range(chunks, num_stages=3):
            channel = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
            is_x = is_token[:, None] & (channel < CHANNELS)[None, :]
            x = _features(x_row_ptr, channel, group, stride_x_channel, stride_x_height, stride_x_width, is_x, CONV)
            added = tl.minimum(CHANNELS - chunk * BLOCK_K, BLOCK_K).to(tl.float32)
            mean, squares, count = merge_moments(mean, squares, count, x, is_x, added)
        inverse = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), tl.sqrt_rn(squares / CHANNELS + EPS))
        means = tl.where(group_index == group, mean[:, None], means)
        inverses = tl.where(group_index == group, inverse[:, None], inverses)

    if PDL:
        tl.extra.cuda.gdc_wait()
    score = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(groups * chunks):
        group = step // chunks
        channel = (step % chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
        is_channel = channel < CHANNELS
        column = group * CHANNELS + channel
        is_x = is_token[:, None] & is_channel[None, :]
        x = _features(x_row_ptr, channel, group, stride_x_channel, stride_x_height, stride_x_width, is_x, CONV)
        is_w = is_channel[:, None] & is_output[None, :]
        place = output.to(tl.int64)[None, :] * (groups * CHANNELS) + column[:, None]
        w = tl.load(weight_ptr + place, mask=is_w, other=0.0)
        scale = tl.load(norm_weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        mean = tl.sum(tl.where(group_index == group, means, 0.0), 1)
        inverse = tl.sum(tl.where(group_index == group, inverses, 0.0), 1)
        n = (x - mean[:, None]) * inverse[:, None] * scale[None, :] + shift[None, :]
        if CONDITIONED:
            if ONE_IMAGE:
                u = tl.load(condition_ptr + hidden + column, mask=is_channel, other=0.0)[None, :]
            else:
                u_ptr = condition_ptr + image[:, None] * stride_condition_image + hidden + column[None, :]
                u = tl.load(u_ptr, mask=is_x, other=0.0)
            score += tl.sum(n * u, 1)
        total = tl.dot(n.to(w.dtype), w, total, input_precision="ieee")

    total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    if CONDITIONED:
        beta = hidden + groups * CHANNELS
        if ONE_IMAGE:
            score += tl.load(condition_ptr + beta)
            key = tl.load(condition_ptr + output, mask=is_output, other=0.0)[None, :]
        else:
            condition_row_ptr = condition_ptr + image * stride_condition_image
            score += tl.load(condition_row_ptr + beta, mask=is_token, other=0.0)
            is_key = is_token[:, None] & is_output[None, :]
            key = tl.load(condition_row_ptr[:, None] + output[None, :], mask=is_key, other=0.0)
        total += score[:, None] * key
    row = token
    if SCATTER:
        row = tl.load(rows_ptr + token * stride_rows_token, mask=is_token, other=-1).to(tl.int64)
    is_stored = is_token & (row >= 0) & (row < out_rows)
    target_ptr = out_ptr + row[:, None] * stride_out_row + output[None, :]
    tl.store(target_ptr, total.to(out_ptr.dtype.element_ty), mask=is_stored[:, None] & is_output[None, :])


@triton.jit(
    do_not_specialize=["tokens", "per_image", "images", "steps", "stride_cu_seqlens", "stride_rows_token", "out_rows"]
)
def identity_kernel(
    x_ptr,
    condition_ptr,
    cu_seqlens_ptr,
    rows_ptr,
    out_ptr,
    tokens,
    per_image,
    images,
    steps,
    hidden,
    stride_x_image,
    stride_x_token,
    stride_condition_image,
    stride_cu_seqlens,
    stride_rows_token,
    out_rows,
    stride_out_row,
    RAGGED: tl.constexpr,
    CONDITIONED: tl.constexpr,
    SCATTER: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write out[row of token] = x + (x·k)·k; whole rows stay in registers, so x is read once."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < tokens
    channel = tl.arange(0, BLOCK_H)
    is_x = is_token[:, None] & (channel < hidden)[None, :]
    image = _image_of(token, per_image, cu_seqlens_ptr, stride_cu_seqlens, images, steps, RAGGED)
    if RAGGED:
        base = token * stride_x_token
    else:
        base = (token // per_image) * stride_x_image + (token % per_image) * stride_x_token
    x = tl.load(x_ptr + base[:, None] + channel[None, :], mask=is_x, other=0.0)
    if CONDITIONED:
        if PDL:
            tl.extra.cuda.gdc_wait()
        f = x.to(tl.float32)
        key_ptr = condition_ptr + image[:, None] * stride_condition_image + channel[None, :]
        key = tl.load(key_ptr, mask=is_x, other=0.0)
        x = (f + tl.sum(f * key, 1)[:, None] * key).to(x.dtype)
    row = token
    if SCATTER:
        row = tl.load(rows_ptr + token * stride_rows_token, mask=is_token, other=-1).to(tl.int64)
    is_stored = is_token & (row >= 0) & (row < out_rows)
    target_ptr = out_ptr + row[:, None] * stride_out_row + channel[None, :]
    tl.store(target_ptr, x, mask=is_stored[:, None] & (channel < hidden)[None, :])


def _project(
    out: Tensor,
    rows: Tensor | None,
    features: Tensor,
    control: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_norm_weight: Tensor | None,
    feature_norm_bias: Tensor | None,
    feature_weight: Tensor | None,
    feature_bias: Tensor | None,
    maps: Condition,
) -> None:
    hidden = maps.weight.shape[0]
    conv = features.dim() == 4
    channels = features.shape[1 if conv else -1]
    cells_across = features.shape[3] // CONV_KERNEL if conv else 0
    per_image = cells_across * (features.shape[2] // CONV_KERNEL) if conv else features.shape[-2]
    tokens = features.shape[0] * per_image if features.dim() > 2 else per_image
    images = features.shape[0] if features.dim() > 2 else 1
    if cu_seqlens is not None:
        images = cu_seqlens.shape[0] - 1
    if not tokens or not out.shape[0]:
        return
    columns = 0 if feature_weight is None else feature_weight.shape[1] + 1
    conditioned = control is not None
    pdl = conditioned and capability(features) >= 90
    strides = features.stride()
    # A single image of 2-D features has no stride of its own.
    stride_image, stride_token = (0, strides[0]) if features.dim() == 2 else strides[:2]
    stride_channel, stride_height, stride_width = strides[1:] if conv else (1, 0, 0)
    shared = {
        "RAGGED": cu_seqlens is not None,
        "CONDITIONED": conditioned,
        "SCATTER": rows is not None,
        "PDL": pdl,
        "launch_pdl": pdl,
    }
    with on_device(features):
        condition = conditions(control, maps, columns, pdl) if control is not None else None
        stride_condition = condition.stride(0) if condition is not None else 0
        stride_cu_seqlens = cu_seqlens.stride(0) if cu_seqlens is not None else 0
        stride_rows = rows.stride(0) if rows is not None else 0
        if feature_weight is None:
            size = "narrow" if hidden <= NARROW else "wide"
            block_m, warps = tuned(features, "identity_kernel", size, IDENTITY_LAUNCHES[size])
            identity_kernel[(triton.cdiv(tokens, block_m),)](
                features,
                condition,
                cu_seqlens,
                rows,
                out,
                tokens,
                per_image,
                images,
                images.bit_length(),
                hidden,
                stride_image,
                stride_token,
                stride_condition,
                stride_cu_seqlens,
                stride_rows,
                out.shape[0],
                out.stride(0),
                BLOCK_M=block_m,
                BLOCK_H=triton.next_power_of_2(hidden),
                num_warps=warps,
                enable_fp_fusion=True,
                **shared,
            )
            return
        size = "few tokens" if tokens < MANY_TOKENS else "many tokens"
        size = "short steps" if conv or features.dtype == torch.float32 else size
        block_m, block_n, block_k, warps, stages = tuned(features, "project_kernel", size, GEMM_LAUNCHES[size])
        grid = (triton.cdiv(tokens, block_m), triton.cdiv(hidden, block_n))
        project_kernel[grid](
            features,
            feature_weight,
            feature_bias,
            feature_norm_weight,
            feature_norm_bias,
            condition,
            cu_seqlens,
            rows,
            out,
            tokens,
            per_image,
            images,
            images.bit_length(),
            hidden,
            cells_across,
            stride_image,
            stride_token,
            stride_channel,
            stride_height,
            stride_width,
            stride_condition,
            stride_cu_seqlens,
            stride_rows,
            out.shape[0],
            out.stride(0),
            CHANNELS=channels,
            CONV=conv,
            ONE_IMAGE=images == 1,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
            **shared,
        )


def control_cross_attention(
    features: Tensor,
    control: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_norm_weight: Tensor | None,
    feature_norm_bias: Tensor | None,
    feature_weight: Tensor | None,
    feature_bias: Tensor | None,
    condition_norm_weight: Tensor,
    condition_norm_bias: Tensor,
    condition_weight: Tensor,
    condition_bias: Tensor,
    score_weight: Tensor | None,
    score_bias: Tensor | None,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Compute both forms; return the tokens in `out` at `rows`, or in a new tensor."""
    hidden = condition_weight.shape[0]
    if out is None:
        if features.dim() == 4:
            tokens = features.shape[0] * (features.shape[2] // CONV_KERNEL) * (features.shape[3] // CONV_KERNEL)
        else:
            tokens = features[..., 0].numel()
        out = torch.empty((tokens, hidden), dtype=features.dtype, device=features.device)
    maps = Condition(
        condition_norm_weight, condition_norm_bias, condition_weight, condition_bias, score_weight, score_bias
    )
    _project(
        out,
        rows,
        features,
        control,
        cu_seqlens,
        feature_norm_weight,
        feature_norm_bias,
        feature_weight,
        feature_bias,
        maps,
    )
    return out


def control_cross_attention_into(*arguments: Any) -> None:
    control_cross_attention(*arguments)


implement("control_cross_attention", "triton", control_cross_attention)
implement("control_cross_attention_into", "triton", control_cross_attention_into)
