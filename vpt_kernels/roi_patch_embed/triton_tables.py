"""Pillow's coefficients along one axis of a region: in a table that one launch makes for all, or where they are used.

Both hold the same integers: float64 arithmetic in Pillow's order (the launches switch contraction off), rounded to 22
bits. The table has a row of int32 per output of the window, (first tap, number of taps, coefficients), and behind the
rows, where NEAREST steps precede, the source of every coordinate that they leave.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vpt_kernels.roi_patch_embed.geometry import FILTERS, Column
from vpt_kernels.roi_patch_embed.triton_staging import FIRST_FILL, RECORD, ROW_WORDS, SOURCES, TABLE

_NEAREST_WIDTH_3 = tl.constexpr(int(Column.NEAREST_WIDTH_3))
_RESIZED_WIDTH = tl.constexpr(int(Column.RESIZED_WIDTH))
_FILTER = tl.constexpr(int(Column.FILTER))
_WINDOW_LEFT = tl.constexpr(int(Column.WINDOW_LEFT))
_GRID_WIDTH = tl.constexpr(int(Column.GRID_WIDTH))
_PATCH_SIZE = tl.constexpr(int(Column.PATCH_SIZE))
_BILINEAR = tl.constexpr(FILTERS.index("bilinear"))
_ONE = tl.constexpr(1 << 22)
_FAR = tl.constexpr(1 << 30)


@triton.jit
def field(region, column):
    """Return a number of the region's record, as the 32 bits that it fits: 64-bit division is slow."""
    return tl.load(region + column).to(tl.int32)


@triton.jit
def find_region(regions_ptr, count, number, column):
    """Return the record of the region that owns program `number`: the last whose first, in `column`, is not beyond."""
    found = 0
    for start in range(0, count, 64):
        i = start + tl.arange(0, 64)
        first = tl.load(regions_ptr + i * RECORD + column, mask=i < count, other=_FAR)
        found += tl.sum((first <= number).to(tl.int32))
    return regions_ptr + (found - 1).to(tl.int64) * RECORD


@triton.jit
def valid_size(region, axis):
    """Return the pixels of the window along `axis` that the resized image covers; the rest is padding."""
    resized = field(region, _RESIZED_WIDTH + axis) - field(region, _WINDOW_LEFT + axis)
    window = field(region, _GRID_WIDTH + axis) * field(region, _PATCH_SIZE)
    return tl.minimum(resized, window)


@triton.jit
def _nearest(i, in_size, out_size):
    """Return the source of NEAREST output i: Pillow adds the step up: ties go where its rounding errors lead."""
    i = tl.minimum(i, out_size - 1)
    step = in_size.to(tl.float64) / out_size.to(tl.float64)
    position = (i.to(tl.float64) + 0.5) * step
    # Sum and product differ by less than 2^-12 (2^20 additions below 2^20), and not at all if no addition rounds.
    near = tl.abs(position - tl.floor(position + 0.5)) < 0.000244140625
    rounds = tl.floor(step * 1048576.0) != step * 1048576.0
    if rounds & (tl.max(near.to(tl.int32)) > 0):
        total = step * 0.5
        for n in range(0, tl.max(i) + 1):
            position = tl.where(i == n, total, position)
            total += step
    return tl.minimum(position.to(tl.int32), in_size - 1)


@triton.jit
def _weight(tap, first, center, inverse, bilinear):
    """Return a tap's unnormalised weight: the triangle, or the cubic of a = -1/2, in Pillow's order of operations."""
    x = tl.abs((tap + first - center + 0.5) * inverse)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    cubic = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(bilinear, tl.where(x < 1.0, 1.0 - x, 0.0), cubic)


@triton.jit
def _taps(region, axis, at, valid):
    """Return first tap, number of taps, centre and weight sum of the outputs at `at`, and 1/filter scale."""
    in_size = field(region, _NEAREST_WIDTH_3 + axis)
    out_size = field(region, _RESIZED_WIDTH + axis)
    bilinear = field(region, _FILTER) == _BILINEAR
    scale = in_size.to(tl.float64) / out_size.to(tl.float64)
    filter_scale = tl.where(scale < 1.0, 1.0, scale)
    inverse = 1.0 / filter_scale
    support = tl.where(bilinear, 1.0, 2.0) * filter_scale
    center = ((at + field(region, _WINDOW_LEFT + axis)).to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int32), in_size) - first
    count = tl.where(valid, count, 0)
    total = tl.zeros_like(center)
    for tap in range(0, tl.max(count)):
        total += tl.where(tap < count, _weight(tap, first, center, inverse, bilinear), 0.0)
    return first, count, center, total, inverse


@triton.jit
def _coefficient(tap, first, center, total, inverse, bilinear):
    """Return a tap's weight in 22-bit fixed point."""
    weight = _weight(tap, first, center, inverse, bilinear)
    weight = weight / tl.where(total != 0.0, total, 1.0)
    fixed = weight * _ONE
    return tl.where(weight < 0.0, fixed - 0.5, fixed + 0.5).to(tl.int32)


@triton.jit
def _traced(region, axis, i):
    """Return coordinate i, as it is after the NEAREST steps, of the crop."""
    for step in tl.static_range(3):
        out_size = field(region, _NEAREST_WIDTH_3 - 2 * step + axis)
        in_size = field(region, _NEAREST_WIDTH_3 - 2 * step - 2 + axis)
        if in_size != out_size:
            i = _nearest(i, in_size, out_size)
    return i


@triton.jit(do_not_specialize=["count"])
def table_kernel(regions_ptr, count, tables_ptr, OUTPUTS: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr):
    """Write OUTPUTS rows of one axis of one region, and as many sources; its second grid axis is the region's axis."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    number, axis = tl.program_id(0), tl.program_id(1)
    region = find_region(regions_ptr, count, number, FIRST_FILL)
    at = (number - field(region, FIRST_FILL)) * OUTPUTS + tl.arange(0, OUTPUTS)
    valid = at < valid_size(region, axis)
    first, taps, center, total, inverse = _taps(region, axis, at, valid)
    row_ptr = _row(region, axis, at, tables_ptr)
    tl.store(row_ptr, first, mask=valid)
    tl.store(row_ptr + 1, taps, mask=valid)
    bilinear = field(region, _FILTER) == _BILINEAR
    for start in range(0, tl.max(taps), TAPS):
        tap = start + tl.arange(0, TAPS)[None, :]
        fixed = _coefficient(tap, first[:, None], center[:, None], total[:, None], inverse, bilinear)
        tl.store(row_ptr[:, None] + 2 + tap, fixed, mask=tap < taps[:, None])
    sources = tl.load(region + SOURCES + axis)
    if sources >= 0:
        stored = at < field(region, _NEAREST_WIDTH_3 + axis)
        tl.store(tables_ptr + sources + at, _traced(region, axis, at), mask=stored)


@triton.jit
def _row(region, axis, at, tables_ptr):
    return tables_ptr + tl.load(region + TABLE + axis) + at.to(tl.int64) * field(region, ROW_WORDS + axis)


@triton.jit
def axis_taps(region, axis, at, valid, tables_ptr):
    """Return first tap and number of taps of the outputs at `at`, and what `band` takes their coefficients from.

    Args:
        tables_ptr: what `table_kernel` has written, or None: then they are computed here.
    """
    if tables_ptr is None:
        first, count, center, total, inverse = _taps(region, axis, at, valid)
        return first, count, (center, total, inverse)
    else:
        row_ptr = _row(region, axis, at, tables_ptr)
        first = tl.load(row_ptr, mask=valid, other=0)
        return first, tl.load(row_ptr + 1, mask=valid, other=0), (row_ptr + 2,)


@triton.jit
def band(region, start, begin, first, count, coefficients, tables_ptr, CHUNK: tl.constexpr):
    """Return int32 [CHUNK, outputs]: coefficients of the coordinates from `start`; `begin` is the least first tap."""
    row = start + tl.arange(0, CHUNK)[:, None] - first[None, :]
    if tables_ptr is None:
        center, total, inverse = coefficients
        bilinear = field(region, _FILTER) == _BILINEAR
        out = tl.zeros(row.shape, tl.int32)
        last = tl.max(tl.where(count > 0, first, 0))
        for tap in range(tl.maximum(start - last, 0), tl.minimum(tl.max(count), start + CHUNK - begin)):
            fixed = _coefficient(tap, first, center, total, inverse, bilinear)
            out = tl.where(row == tap, tl.where(tap < count, fixed, 0)[None, :], out)
        return out
    else:
        return tl.load(coefficients[0][None, :] + row, mask=(row >= 0) & (row < count[None, :]), other=0)


@triton.jit
def crop_coordinate(region, axis, i, tables_ptr):
    """Return coordinate i, as it is after the NEAREST steps, of the crop; beyond the last one, any."""
    if tables_ptr is None:
        return _traced(region, axis, i)
    else:
        sources = tl.load(region + SOURCES + axis)
        if sources >= 0:
            i = tl.load(tables_ptr + sources + tl.minimum(i, field(region, _NEAREST_WIDTH_3 + axis) - 1))
        return i
