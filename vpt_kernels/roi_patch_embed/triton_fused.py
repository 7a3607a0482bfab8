"""`roi_patch_embed` in one launch without a workspace: pixels are resampled in the prologue of the product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vpt_kernels.launch import tuned
from vpt_kernels.roi_patch_embed.geometry import FILTERS, Column
from vpt_kernels.roi_patch_embed.triton_resample import (
    bias_entry,
    multiply,
    resample,
    row_part,
)
from vpt_kernels.roi_patch_embed.triton_staging import FIRST_TILE, patch_bytes, stage
from vpt_kernels.roi_patch_embed.triton_tables import field, find_region, valid_size

_GRID_WIDTH = tl.constexpr(int(Column.GRID_WIDTH))
_VERTICAL_FIRST = tl.constexpr(int(Column.VERTICAL_FIRST))
_FIRST_ROW = tl.constexpr(int(Column.FIRST_ROW))
_SLOT = tl.constexpr(16)
"""Pixels a patch takes of a tile, along each axis: tensor shapes are powers of two."""

MAX_PATCH = 16
MAX_TAPS = 33
"""Taps of the widest filter: beyond a reduction to an eighth (bicubic), one block would work through ever more source
pixels for its 16 patches while most of the chip idles."""


class Strip(NamedTuple):
    """Launch of `strip_kernel`: patches a side of a block's square, source pixels of one product, output columns of
    one step, warps."""

    side: int
    chunk: int
    columns: int
    warps: int


STRIP = Strip(4, 32, 16, 8)


@triton.jit(do_not_specialize=["count"])
def strip_kernel(
    regions_ptr,
    count,
    weight_ptr,
    bias_ptr,
    out_ptr,
    embed,
    stride_out_row,
    P: tl.constexpr,
    WEIGHT_ROW: tl.constexpr,
    SIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
):
    """Turn a square of SIDE × SIDE patches of one region into their tokens, all columns."""
    tile = tl.program_id(0)
    region = find_region(regions_ptr, count, tile, FIRST_TILE)
    tile -= field(region, FIRST_TILE)
    outer_axis = 1 - field(region, _VERTICAL_FIRST)
    inner_axis = 1 - outer_axis
    across = tl.cdiv(field(region, _GRID_WIDTH), SIDE)
    patch_o = tl.where(outer_axis == 0, tile % across, tile // across) * SIDE
    patch_i = tl.where(outer_axis == 0, tile // across, tile % across) * SIDE
    valid_o, valid_i = valid_size(region, outer_axis), valid_size(region, inner_axis)
    lane = tl.arange(0, SIDE * _SLOT)
    within = lane % _SLOT
    outer, inner = (patch_o + lane // _SLOT) * P + within, (patch_i + lane // _SLOT) * P + within
    inside_o, inside_i = (within < P) & (outer < valid_o), (within < P) & (inner < valid_i)
    pixels = resample(region, None, outer_axis, outer, inside_o, inner, inside_i, CHUNK)

    # [channel, inner, outer] → [group, patch, k]: every warp owns the operand's share of one channel and half its rows
    # (outer), and the weight's; patches and pixels in (outer, inner) order.
    pixels = pixels.reshape(4, SIDE, _SLOT, SIDE, 2, _SLOT // 2).permute(0, 4, 3, 1, 5, 2)
    pixels = pixels.reshape(8, SIDE * SIDE, _SLOT * _SLOT // 2)

    m = tl.arange(0, SIDE * SIDE)
    patch_o, patch_i = patch_o + m // SIDE, patch_i + m % SIDE
    stored = (patch_o < field(region, _GRID_WIDTH + outer_axis)) & (patch_i < field(region, _GRID_WIDTH + inner_axis))
    rest_o, rest_i = valid_o - patch_o * P, valid_i - patch_i * P
    vertical = outer_axis == 1
    entry = bias_entry(tl.where(vertical, rest_o, rest_i), tl.where(vertical, rest_i, rest_o), P)
    row = field(region, _FIRST_ROW) + row_part(region, outer_axis, patch_o) + row_part(region, inner_axis, patch_i)
    target_row_ptr = out_ptr + row.to(tl.int64)[:, None] * stride_out_row
    group, k = tl.arange(0, 8)[:, None], tl.arange(0, _SLOT * _SLOT // 2)[None, :]
    channel, at_o, at_i = group // 2, group % 2 * (_SLOT // 2) + k // _SLOT, k % _SLOT
    inside = ((channel < 3) & (at_o < P) & (at_i < P))[:, :, None]
    at = channel + at_o * tl.where(outer_axis == 0, 3, 3 * P) + at_i * tl.where(inner_axis == 0, 3, 3 * P)
    weight_ptr += at[:, :, None]
    for start in range(0, embed, BN):
        n = start + tl.arange(0, BN)
        part = tl.load(weight_ptr + n * WEIGHT_ROW, mask=inside & (n < embed), other=0.0)
        total = tl.sum(multiply(pixels, part, tl.zeros([8, SIDE * SIDE, BN], tl.float32)), axis=0)
        mask = stored[:, None] & (n < embed)[None, :]
        total += tl.load(bias_ptr + entry[:, None] * embed + n[None, :], mask=mask, other=0.0)
        tl.store(target_row_ptr + n[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def embed_in_one_launch(
    images: Sequence[Tensor], plan: Tensor, rows: int, weight: Tensor, bias: Tensor, out: Tensor
) -> None:
    """Write the tokens of a plan that is not empty to `out` [rows, E] on the current device.

    Raises:
        ValueError: patches are larger than 16 × 16, or an axis is reduced so much that it needs more than 33 taps.
    """
    embed, row_bytes = weight.shape[0], patch_bytes(weight, bias)
    patch = bias.shape[1] - 1
    if patch > MAX_PATCH:
        raise ValueError(f"one launch: patch size {patch} exceeds {MAX_PATCH}; use two launches")
    launch = tuned(weight, "strip_kernel", "all", STRIP)
    staged = stage(images, plan, rows, row_bytes, launch.side, in_patches=True)
    c = Column
    for region in plan.tolist():
        radius = 2 if FILTERS[region[c.FILTER]] == "bicubic" else 1
        scale = max(
            1.0,
            region[c.NEAREST_WIDTH_3] / region[c.RESIZED_WIDTH],
            region[c.NEAREST_HEIGHT_3] / region[c.RESIZED_HEIGHT],
        )
        if 2 * radius * scale + 1 > MAX_TAPS:
            raise ValueError(
                f"one launch: a reduction by {scale:.1f} needs {2 * radius * scale + 1:.0f} taps, the limit is "
                f"{MAX_TAPS}; use two launches"
            )
    strip_kernel[(staged.tiles,)](
        staged.records,
        len(plan),
        weight,
        bias,
        out,
        embed,
        out.stride(0),
        P=patch,
        WEIGHT_ROW=weight.stride(0),
        SIDE=launch.side,
        CHUNK=launch.chunk,
        BN=launch.columns,
        num_warps=launch.warps,
        num_stages=1,
        enable_fp_fusion=False,
    )
