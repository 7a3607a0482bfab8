"""k, u and β of every image, by one GEMV over the stacked maps of the condition."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_kernels.launch import tuned

CONDITION_LAUNCHES = {
    # BLOCK_IMAGES, BLOCK_N rows, BLOCK_K, num_warps
    "one image": (1, 4, 512, 4),
    "images": (4, 4, 256, 4),
}
"""The maps are read once for every BLOCK_IMAGES images; 4 KB of bfloat16 in flight per program."""
EPS = tl.constexpr(1e-5)


@triton.jit
def merge_moments(mean, squares, count, x, is_x, added):
    """Return mean and sum of squared deviations of rows [R] after `added` more columns x [R, K]; nothing cancels."""
    chunk_mean = tl.sum(tl.where(is_x, x, 0.0), 1) / added
    deviation = tl.where(is_x, x - chunk_mean[:, None], 0.0)
    delta = chunk_mean - mean
    total = count + added
    mean += delta * (added / total)
    squares += tl.sum(deviation * deviation, 1) + delta * delta * (count * added / total)
    return mean, squares, total


@triton.jit
def _mapped_rows(
    weight_ptr,
    bias_ptr,
    row,
    rows,
    hidden,
    control_ptr,
    image,
    images,
    stride_control_image,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    stride_out_image,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write out[image, row] = weight[row] · LayerNorm(control[image]) + bias[row], float32; both indices int64."""
    column = tl.arange(0, BLOCK_K)
    is_image, is_row = image < images, row < rows
    control_row_ptr = control_ptr + image[:, None] * stride_control_image
    mean = tl.zeros((BLOCK_IMAGES,), tl.float32)
    squares = tl.zeros((BLOCK_IMAGES,), tl.float32)
    count = 0.0
    for start in range(0, hidden, BLOCK_K):
        is_h = is_image[:, None] & (start + column < hidden)[None, :]
        h = tl.load(control_row_ptr + (start + column)[None, :], mask=is_h, other=0.0)
        added = tl.minimum(hidden - start, BLOCK_K).to(tl.float32)
        mean, squares, count = merge_moments(mean, squares, count, h.to(tl.float32), is_h, added)
    inverse = tl.div_rn(tl.full((BLOCK_IMAGES,), 1.0, tl.float32), tl.sqrt_rn(squares / hidden + EPS))
    total = tl.zeros((BLOCK_N, BLOCK_IMAGES), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        is_column = start + column < hidden
        is_h = is_image[:, None] & is_column[None, :]
        is_w = is_row[:, None] & is_column[None, :]
        w = tl.load(weight_ptr + row[:, None] * hidden + (start + column)[None, :], mask=is_w, other=0.0)
        h = tl.load(control_row_ptr + (start + column)[None, :], mask=is_h, other=0.0)
        scale = tl.load(norm_weight_ptr + start + column, mask=is_column, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias_ptr + start + column, mask=is_column, other=0.0).to(tl.float32)
        n = (h.to(tl.float32) - mean[:, None]) * inverse[:, None] * scale[None, :] + shift[None, :]
        total += tl.sum(w.to(tl.float32)[:, None, :] * n[None, :, :], 2)
    total += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    target_ptr = out_ptr + image[None, :] * stride_out_image + row[:, None]
    tl.store(target_ptr, total, mask=is_row[:, None] & is_image[None, :])


@triton.jit(do_not_specialize=["images"])
def condition_kernel(
    control_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    score_weight_ptr,
    score_bias_ptr,
    out_ptr,
    images,
    hidden,
    score_rows,
    stride_control_image,
    stride_out_image,
    PDL: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write out [images, H + score_rows]: k, u, β. k's rows come first; score_rows is 0 in the identity form."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    image = (tl.program_id(1) * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)).to(tl.int64)
    block = tl.program_id(0)
    key_blocks = tl.cdiv(hidden, BLOCK_N)
    if block < key_blocks:
        row = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        _mapped_rows(
            weight_ptr,
            bias_ptr,
            row,
            hidden,
            hidden,
            control_ptr,
            image,
            images,
            stride_control_image,
            norm_weight_ptr,
            norm_bias_ptr,
            out_ptr,
            stride_out_image,
            BLOCK_IMAGES,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        row = ((block - key_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        _mapped_rows(
            score_weight_ptr,
            score_bias_ptr,
            row,
            score_rows,
            hidden,
            control_ptr,
            image,
            images,
            stride_control_image,
            norm_weight_ptr,
            norm_bias_ptr,
            out_ptr + hidden,
            stride_out_image,
            BLOCK_IMAGES,
            BLOCK_N,
            BLOCK_K,
        )


class Condition(NamedTuple):
    """What maps a control row to k, u and β; the score maps are None in the identity form."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    score_weight: Tensor | None
    score_bias: Tensor | None


def conditions(control: Tensor, maps: Condition, columns: int, pdl: bool) -> Tensor:
    """Return k, u and β of every image: float32 [images, H + columns], columns D + 1, or 0 in the identity form."""
    images, hidden = control.shape
    out = torch.empty((images, hidden + columns), dtype=torch.float32, device=control.device)
    size = "one image" if images == 1 else "images"
    block_images, block_n, block_k, warps = tuned(control, "condition_kernel", size, CONDITION_LAUNCHES[size])
    grid = (
        triton.cdiv(hidden, block_n) + triton.cdiv(columns, block_n),
        triton.cdiv(images, block_images),
    )
    condition_kernel[grid](
        control,
        maps.norm_weight,
        maps.norm_bias,
        maps.weight,
        maps.bias,
        maps.score_weight,
        maps.score_bias,
        out,
        images,
        hidden,
        columns,
        control.stride(0),
        out.stride(0),
        PDL=pdl,
        BLOCK_IMAGES=block_images,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return out
