"""Triton backend of `roi_patches` and `roi_patch_embed`: see the README beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_kernels.launch import capability, on_device, tuned
from vpt_kernels.library import implement
from vpt_kernels.roi_patch_embed.geometry import Column
from vpt_kernels.roi_patch_embed.triton_resample import (
    ZERO,
    bias_entry,
    multiply,
    resample,
    row_part,
)
from vpt_kernels.roi_patch_embed.triton_staging import FILL_OUTPUTS, FIRST_TILE, PITCH, patch_bytes, stage
from vpt_kernels.roi_patch_embed.triton_tables import field, find_region, table_kernel, valid_size

_GRID_WIDTH = tl.constexpr(int(Column.GRID_WIDTH))
_PATCH_SIZE = tl.constexpr(int(Column.PATCH_SIZE))
_VERTICAL_FIRST = tl.constexpr(int(Column.VERTICAL_FIRST))
_FIRST_ROW = tl.constexpr(int(Column.FIRST_ROW))


@triton.jit
def _place(region, axis, at, stride_out_row):
    """Return the share of window coordinate `at` along `axis` in a byte's offset in the patch matrix."""
    patch = field(region, _PATCH_SIZE)
    within = tl.where(axis == 0, 3, 3 * patch)
    return row_part(region, axis, at // patch).to(tl.int64) * stride_out_row + at % patch * within


@triton.jit(do_not_specialize=["count"])
def resample_kernel(
    regions_ptr,
    count,
    tables_ptr,
    out_ptr,
    stride_out_row,
    ENTRY: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Resample a TILE × TILE window of a region into the patch matrix; its bias entry, int32, at byte ENTRY."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    region = find_region(regions_ptr, count, tile, FIRST_TILE)
    tile -= field(region, FIRST_TILE)
    patch = field(region, _PATCH_SIZE)
    outer_axis = 1 - field(region, _VERTICAL_FIRST)
    inner_axis = 1 - outer_axis
    tiles_across = tl.cdiv(field(region, _GRID_WIDTH) * patch, field(region, PITCH))
    tile_o = tl.where(outer_axis == 0, tile % tiles_across, tile // tiles_across)
    tile_i = tl.where(outer_axis == 0, tile // tiles_across, tile % tiles_across)
    begin_o, begin_i = tile_o * field(region, PITCH + outer_axis), tile_i * field(region, PITCH + inner_axis)
    # Tiles are as far apart as their taps' span allows; what lies beyond belongs to the next one.
    end_o = tl.minimum(begin_o + field(region, PITCH + outer_axis), field(region, _GRID_WIDTH + outer_axis) * patch)
    end_i = tl.minimum(begin_i + field(region, PITCH + inner_axis), field(region, _GRID_WIDTH + inner_axis) * patch)
    valid_o, valid_i = valid_size(region, outer_axis), valid_size(region, inner_axis)
    outer, inner = begin_o + tl.arange(0, TILE), begin_i + tl.arange(0, TILE)
    if PDL:
        tl.extra.cuda.gdc_wait()
    pixels = resample(
        region,
        tables_ptr,
        outer_axis,
        outer,
        outer < tl.minimum(valid_o, end_o),
        inner,
        inner < tl.minimum(valid_i, end_i),
        CHUNK,
    )

    channel = tl.arange(0, 4 * TILE) // TILE
    inner = begin_i + tl.arange(0, 4 * TILE) % TILE
    inside = ((inner < end_i) & (channel < 3))[:, None] & (outer < end_o)[None, :]
    offset_o = _place(region, outer_axis, outer, stride_out_row)
    offset_i = _place(region, inner_axis, inner, stride_out_row) + channel
    region_ptr = out_ptr + field(region, _FIRST_ROW).to(tl.int64) * stride_out_row
    byte_ptr = region_ptr + (offset_i[:, None] + offset_o[None, :])
    tl.store(byte_ptr, (pixels + ZERO).to(tl.uint8), mask=inside)
    if ENTRY is not None:
        rest_o, rest_i = (valid_o - outer)[None, :], (valid_i - inner)[:, None]
        vertical = outer_axis == 1
        entry = bias_entry(tl.where(vertical, rest_o, rest_i), tl.where(vertical, rest_i, rest_o), patch)
        corner = ((inner % patch == 0) & (channel == 0))[:, None] & (outer % patch == 0)[None, :]
        tl.store((byte_ptr + ENTRY).to(tl.pointer_type(tl.int32)), entry, mask=inside & corner)


@triton.jit(do_not_specialize=["rows"])
def embed_kernel(
    patches_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    embed,
    stride_weight_row,
    stride_out_row,
    K: tl.constexpr,
    STRIDE_ROW: tl.constexpr,
    ENTRY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Turn rows of bytes into tokens: out = (bytes − 128)/256 · weightᵀ + bias[entry of the row], rounded once.

    A weight that is padded to K columns multiplies what stands behind a row's pixels, its bias entry, by zero.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows and columns beyond the end compute garbage of the last ones, which is not stored.
    row = tl.minimum(m, rows - 1).to(tl.int64)
    column = tl.minimum(n, embed - 1)
    a_ptr = patches_ptr + row[:, None] * STRIDE_ROW + k[None, :]
    b_ptr = weight_ptr + column.to(tl.int64)[None, :] * stride_weight_row + k[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for start in range(0, K, BK):
        inside = k < K - start
        pixels = tl.load(a_ptr + start, mask=inside[None, :], other=ZERO)
        part = tl.load(b_ptr + start, mask=inside[:, None], other=0.0)
        total = multiply(pixels.to(tl.int32) - ZERO, part, total)
    entry = tl.load((patches_ptr + row * STRIDE_ROW + ENTRY).to(tl.pointer_type(tl.int32)))
    total += tl.load(bias_ptr + entry[:, None] * embed + column[None, :])
    target_ptr = out_ptr + m.to(tl.int64)[:, None] * stride_out_row + n[None, :]
    tl.store(target_ptr, total.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < embed)[None, :])


class Resampling(NamedTuple):
    """Launch of `resample_kernel`: pixels a side of a tile, source pixels of one product, warps."""

    tile: int
    chunk: int
    warps: int


class Product(NamedTuple):
    """Launch of `embed_kernel`: rows, columns and K of a block, warps, pipeline stages."""

    rows: int
    columns: int
    k: int
    warps: int
    stages: int


RESAMPLING = Resampling(32, 32, 8)
FILL_TAPS = 16
"""Taps of an output whose coefficients a program that fills the table makes at once."""
PRODUCTS = {
    "float32": Product(64, 64, 32, 4, 3),
    "few rows": Product(64, 64, 64, 4, 4),
    "many rows": Product(128, 128, 64, 8, 3),
}
FEW_ROWS = 4096


def _resample(
    images: Sequence[Tensor], plan: Tensor, rows: int, row_bytes: int, out: Tensor, entry: int | None
) -> None:
    """Write the plan's patches to `out`, and their bias entries at byte `entry`, by two launches."""
    launch = tuned(out, "resample_kernel", "all", RESAMPLING)
    staged = stage(images, plan, rows, row_bytes, launch.tile, in_patches=False)
    tables = torch.empty(staged.words, dtype=torch.int32, device=out.device)
    chained = capability(out) >= 90
    options = {"launch_pdl": True} if chained else {}
    table_kernel[(staged.fills, 2)](
        staged.records,
        len(plan),
        tables,
        OUTPUTS=FILL_OUTPUTS,
        TAPS=FILL_TAPS,
        PDL=chained,
        num_warps=1,
        num_stages=1,
        enable_fp_fusion=False,
    )
    resample_kernel[(staged.tiles,)](
        staged.records,
        len(plan),
        tables,
        out,
        out.stride(0),
        ENTRY=entry,
        TILE=launch.tile,
        CHUNK=launch.chunk,
        PDL=chained,
        num_warps=launch.warps,
        num_stages=1,
        enable_fp_fusion=False,
        **options,
    )


def roi_patches(images: Sequence[Tensor], plan: Tensor, rows: int, row_bytes: int) -> Tensor:
    device = images[0].device if images else plan.device
    out = torch.empty((rows, row_bytes), dtype=torch.uint8, device=device)
    if len(plan):
        with on_device(out):
            _resample(images, plan, rows, row_bytes, out, None)
    return out


def patch_row_layout(row_bytes: int) -> tuple[int, int]:
    """Return (bytes between rows of the workspace, offset of a row's bias entry): 592 and 588 for a patch
    of 14 × 14.
    """
    entry = -(-row_bytes // 4) * 4
    return -(-(entry + 4) // 16) * 16, entry


def _product(rows: int, weight: Tensor) -> Product:
    size = "float32" if weight.dtype == torch.float32 else "few rows" if rows <= FEW_ROWS else "many rows"
    return tuned(weight, "embed_kernel", size, PRODUCTS[size])


def _embed(images: Sequence[Tensor], plan: Tensor, rows: int, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write the tokens of `plan` to `out` [rows, E] by three launches."""
    embed, row_bytes = weight.shape[0], patch_bytes(weight, bias)
    if not len(plan) or not embed:
        return
    stride, entry = patch_row_layout(row_bytes)
    with on_device(weight):
        patches = torch.empty((rows, stride), dtype=torch.uint8, device=weight.device)
        chained = capability(weight) >= 90
        _resample(images, plan, rows, row_bytes, patches, entry)
        block = _product(rows, weight)
        options = {"launch_pdl": True} if chained else {}
        embed_kernel[(triton.cdiv(rows, block.rows), triton.cdiv(embed, block.columns))](
            patches,
            weight,
            bias,
            out,
            rows,
            embed,
            weight.stride(0),
            out.stride(0),
            K=weight.shape[1],
            STRIDE_ROW=stride,
            ENTRY=entry,
            BM=block.rows,
            BN=block.columns,
            BK=block.k,
            PDL=chained,
            num_warps=block.warps,
            num_stages=block.stages,
            enable_fp_fusion=True,
            **options,
        )


def roi_patch_embed(images: Sequence[Tensor], plan: Tensor, rows: int, weight: Tensor, bias: Tensor) -> Tensor:
    out = weight.new_empty((rows, weight.shape[0]))
    _embed(images, plan, rows, weight, bias, out)
    return out


def roi_patch_embed_into(
    images: Sequence[Tensor], plan: Tensor, weight: Tensor, bias: Tensor, out: Tensor, row: int
) -> None:
    rows = sum(w * h for w, h in plan[:, Column.GRID_WIDTH : Column.GRID_HEIGHT + 1].tolist())
    if not 0 <= row <= out.shape[0] - rows:
        raise ValueError(f"rows {row}..{row + rows} do not fit out's {out.shape[0]} rows; enlarge out")
    _embed(images, plan, rows, weight, bias, out[row : row + rows])


implement("roi_patches", "triton", roi_patches)
implement("roi_patch_embed", "triton", roi_patch_embed)
implement("roi_patch_embed_into", "triton", roi_patch_embed_into)
