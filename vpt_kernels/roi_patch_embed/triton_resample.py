"""Device functions of the Triton backend: a tile of resampled pixels, bit-exact with Pillow.

A pass along one axis is a product with a banded matrix of 22-bit coefficients. The matrix is built from float64
arithmetic in Pillow's order (the launches switch contraction off), split into two 12-bit slices that float16 holds
exactly, and multiplied on tensor cores: a product with a centred byte is at most 2^18, the sum of a chunk of at most 64
of them at most 2^24, so every float32 sum is an exact integer. Pillow's rounding to a byte after each pass then happens
in int32.

Both axes are treated alike. "Inner" is the axis that is resampled first (0: columns, 1: rows), "outer" the other one;
the plan's columns come in (x, y) pairs, so that an axis is an offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vpt_kernels.roi_patch_embed.geometry import FILTERS, PIXEL_SCALE, PIXEL_ZERO, Column
from vpt_kernels.roi_patch_embed.triton_staging import FIRST_TILE, PIXELS, RECORD, STRIDES

_LEFT = tl.constexpr(int(Column.LEFT))
_NEAREST_WIDTH_3 = tl.constexpr(int(Column.NEAREST_WIDTH_3))
_RESIZED_WIDTH = tl.constexpr(int(Column.RESIZED_WIDTH))
_FILTER = tl.constexpr(int(Column.FILTER))
_VERTICAL_FIRST = tl.constexpr(int(Column.VERTICAL_FIRST))
_WINDOW_LEFT = tl.constexpr(int(Column.WINDOW_LEFT))
_GRID_WIDTH = tl.constexpr(int(Column.GRID_WIDTH))
_PATCH_SIZE = tl.constexpr(int(Column.PATCH_SIZE))
_MERGE_SIZE = tl.constexpr(int(Column.MERGE_SIZE))
_FIRST_ROW = tl.constexpr(int(Column.FIRST_ROW))
_BILINEAR = tl.constexpr(FILTERS.index("bilinear"))
ZERO = tl.constexpr(PIXEL_ZERO)
_PIXEL = tl.constexpr(1.0 / PIXEL_SCALE)

_BITS = tl.constexpr(32 - 8 - 2)
_ONE = tl.constexpr(1 << 22)
_HALF = tl.constexpr(1 << 21)
_FAR = tl.constexpr(1 << 30)


@triton.jit
def field(region, column):
    """Return a number of the region's record, as the 32 bits that it fits: 64-bit division is slow."""
    return tl.load(region + column).to(tl.int32)


@triton.jit
def find_region(regions_ptr, count, tile):
    """Return the record of the region that owns `tile`: the last whose first tile is not beyond it."""
    found = 0
    for start in range(0, count, 64):
        i = start + tl.arange(0, 64)
        first = tl.load(regions_ptr + i * RECORD + FIRST_TILE, mask=i < count, other=_FAR)
        found += tl.sum((first <= tile).to(tl.int32))
    return regions_ptr + (found - 1).to(tl.int64) * RECORD


@triton.jit
def valid_size(region, axis):
    """Return the pixels of the window along `axis` that the resized image covers; the rest is padding."""
    resized = field(region, _RESIZED_WIDTH + axis) - field(region, _WINDOW_LEFT + axis)
    window = field(region, _GRID_WIDTH + axis) * field(region, _PATCH_SIZE)
    return tl.minimum(resized, window)


@triton.jit
def row_part(region, axis, patch):
    """Return the share of patch coordinate `patch` along `axis` in the output's row; the two axes' shares add up."""
    merge = field(region, _MERGE_SIZE)
    width = field(region, _GRID_WIDTH)
    block = tl.where(axis == 0, merge * merge, width * merge)
    within = tl.where(axis == 0, 1, merge)
    return patch // merge * block + patch % merge * within


@triton.jit
def bias_entry(tall, wide, patch):
    """Return the entry of the bias table for patches of which `tall` rows and `wide` columns are image."""
    tall = tl.minimum(tl.maximum(tall, 0), patch)
    wide = tl.minimum(tl.maximum(wide, 0), patch)
    return tl.where(tall < patch, tall, tl.where(wide < patch, patch + 1 + wide, patch))


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
def _source(region, axis, i):
    """Return the byte offset, from the image's start, of coordinate i of the crop as it is after the NEAREST steps."""
    for step in tl.static_range(3):
        out_size = field(region, _NEAREST_WIDTH_3 - 2 * step + axis)
        in_size = field(region, _NEAREST_WIDTH_3 - 2 * step - 2 + axis)
        if in_size != out_size:
            i = _nearest(i, in_size, out_size)
    return (i + field(region, _LEFT + axis)) * tl.load(region + STRIDES + axis)


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
def _band(region, start, begin, first, count, center, total, inverse, CHUNK: tl.constexpr):
    """Return int32 [CHUNK, outputs]: coefficients of the coordinates from `start`; `begin` is the least first tap."""
    bilinear = field(region, _FILTER) == _BILINEAR
    row = start + tl.arange(0, CHUNK)[:, None] - first[None, :]
    band = tl.zeros(row.shape, tl.int32)
    last = tl.max(tl.where(count > 0, first, 0))
    for tap in range(tl.maximum(start - last, 0), tl.minimum(tl.max(count), start + CHUNK - begin)):
        weight = _weight(tap, first, center, inverse, bilinear)
        weight = weight / tl.where(total != 0.0, total, 1.0)
        fixed = weight * _ONE
        rounded = tl.where(weight < 0.0, fixed - 0.5, fixed + 0.5).to(tl.int32)
        band = tl.where(row == tap, tl.where(tap < count, rounded, 0)[None, :], band)
    return band


@triton.jit
def _filtered(pixels, band, total):
    """Return total + (pixels + 128)·band, exactly; pixels float16 [M, CHUNK] are bytes minus 128."""
    low = ((band + 2048) & 4095) - 2048
    high = (band - low) >> 12
    low_sum = tl.dot(pixels, low.to(tl.float16)).to(tl.int32)
    high_sum = tl.dot(pixels, high.to(tl.float16)).to(tl.int32)
    return total + low_sum + (high_sum << 12) + (tl.sum(band, axis=0) * ZERO)[None, :]


@triton.jit
def _centred_byte(total):
    """Return a sum as Pillow rounds it, minus 128: the next product's operand."""
    byte = (total + _HALF) >> _BITS
    return tl.minimum(tl.maximum(byte, 0), 255) - ZERO


@triton.jit
def resample(region, outer_axis, outer, outer_valid, inner, inner_valid, CHUNK: tl.constexpr):
    """Return the pixels at window coordinates inner × outer, minus 128.

    Returns:
        int32 [4·inner, outer], rows in (channel, inner) order; a fourth channel and invalid pixels are 0.
    """
    INNER: tl.constexpr = inner.shape[0]
    OUTER: tl.constexpr = outer.shape[0]
    inner_axis = 1 - outer_axis
    first_o, count_o, center_o, total_o, inverse_o = _taps(region, outer_axis, outer, outer_valid)
    first_i, count_i, center_i, total_i, inverse_i = _taps(region, inner_axis, inner, inner_valid)
    begin_o, end_o = tl.min(tl.where(outer_valid, first_o, _FAR)), tl.max(first_o + count_o)
    begin_i, end_i = tl.min(tl.where(inner_valid, first_i, _FAR)), tl.max(first_i + count_i)
    end_o, end_i = tl.where(begin_o < _FAR, end_o, 0), tl.where(begin_i < _FAR, end_i, 0)
    image_ptr = tl.load(region + PIXELS).to(tl.pointer_type(tl.uint8))
    lane = tl.arange(0, 4 * CHUNK)
    channel = lane // CHUNK
    # The first pass makes lines along the inner axis, in (channel, source coordinate of the outer axis) order.
    image_ptr += channel * tl.load(region + STRIDES + 2)
    out = tl.zeros([4 * INNER, OUTER], tl.int32)
    for o in range(begin_o, end_o, CHUNK):
        at_o = o + lane % CHUNK
        line_ptr = image_ptr + _source(region, outer_axis, at_o)
        line = tl.zeros([4 * CHUNK, INNER], tl.int32)
        for i in range(begin_i, end_i, CHUNK):
            at_i = i + tl.arange(0, CHUNK)
            mask = (at_i < end_i)[:, None] & ((at_o < end_o) & (channel < 3))[None, :]
            # Where strides are unknown the compiler lets lanes run along the first dimension: the image's rows.
            pixels = tl.load(line_ptr[None, :] + _source(region, inner_axis, at_i)[:, None], mask=mask, other=ZERO)
            pixels = (pixels.to(tl.int32) - ZERO).to(tl.float16).trans()
            band = _band(region, i, begin_i, first_i, count_i, center_i, total_i, inverse_i, CHUNK)
            line = _filtered(pixels, band, line)
        line = _centred_byte(line).to(tl.float16)
        line = line.reshape(4, CHUNK, INNER).trans(0, 2, 1).reshape(4 * INNER, CHUNK)
        band = _band(region, o, begin_o, first_o, count_o, center_o, total_o, inverse_o, CHUNK)
        out = _filtered(line, band, out)
    valid = tl.broadcast_to(inner_valid[None, :, None] & outer_valid[None, None, :], 4, INNER, OUTER)
    return tl.where(valid.reshape(4 * INNER, OUTER), _centred_byte(out), 0)


@triton.jit
def multiply(pixels, weight, total):
    """Return total + pixels/256 · weight; pixels are bytes minus 128, weight [K, N] is float32, bfloat16 or float16.

    A float32 weight goes through the tensor cores in three bfloat16 parts, which hold its 24 bits: every product is
    exact. Its sums start afresh in every call, because tensor cores truncate when they add: short sums, added in
    float32. (On sm_100 Triton 3.6 computes float32 products in TF32 even where IEEE precision is asked for.)
    """
    operand = pixels.to(tl.float32) * _PIXEL
    if weight.dtype == tl.float32:
        operand = operand.to(tl.bfloat16)
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        part = tl.dot(operand, low)
        part = tl.dot(operand, middle, part)
        return total + tl.dot(operand, high, part)
    else:
        return tl.dot(operand.to(weight.dtype), weight, total)
