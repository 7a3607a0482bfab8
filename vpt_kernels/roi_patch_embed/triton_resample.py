"""Device functions of the Triton backend: a tile of resampled pixels, bit-exact with Pillow.

A pass along one axis is a product with a banded matrix of 22-bit coefficients. The matrix is built from float64
arithmetic in Pillow's order (the launches switch contraction off), split into two 12-bit digits that float16 holds
exactly, and multiplied on tensor cores: a product with a centred byte is at most 2^18, a sum of 64 of them at most 2^24,
so every float32 sum is an exact integer. Pillow's rounding to a byte after each pass then happens in int32.

Both axes are treated alike. "Inner" is the axis that is resampled first (0: columns, 1: rows), "outer" the other one;
the plan's columns come in (x, y) pairs, so that an axis is an offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vpt_kernels.roi_patch_embed.geometry import FILTERS, PIXEL_ZERO, Column
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

_BITS = tl.constexpr(32 - 8 - 2)
_ONE = tl.constexpr(1 << 22)
_HALF = tl.constexpr(1 << 21)
_FAR = tl.constexpr(1 << 30)
MAX_CHUNK = 64
"""Most products that one float32 sum may hold: 64 · 2^11 · 2^7 = 2^24."""


@triton.jit
def find_region(regions, count, tile):
    """The record of the region that owns `tile`: the last whose first tile is not beyond it."""
    found = 0
    for start in range(0, count, 64):
        i = start + tl.arange(0, 64)
        first = tl.load(regions + i * RECORD + FIRST_TILE, mask=i < count, other=_FAR)
        found += tl.sum((first <= tile).to(tl.int32))
    return regions + (found - 1).to(tl.int64) * RECORD


@triton.jit
def valid_size(region, axis):
    """Pixels of the window along `axis` that the resized image covers; the rest is padding."""
    resized = tl.load(region + _RESIZED_WIDTH + axis) - tl.load(region + _WINDOW_LEFT + axis)
    window = tl.load(region + _GRID_WIDTH + axis) * tl.load(region + _PATCH_SIZE)
    return tl.minimum(resized, window).to(tl.int32)


@triton.jit
def row_part(region, axis, patch):
    """Share of coordinate `patch` (in patches, along `axis`) in the output's row; the two axes' shares add up."""
    merge = tl.load(region + _MERGE_SIZE)
    width = tl.load(region + _GRID_WIDTH)
    block = tl.where(axis == 0, merge * merge, width * merge)
    within = tl.where(axis == 0, 1, merge)
    return patch // merge * block + patch % merge * within


@triton.jit
def bias_entry(tall, wide, patch):
    """Entry of the bias table for patches of which `tall` rows and `wide` columns are image."""
    tall = tl.minimum(tl.maximum(tall, 0), patch)
    wide = tl.minimum(tl.maximum(wide, 0), patch)
    return tl.where(tall < patch, tall, tl.where(wide < patch, patch + 1 + wide, patch))


@triton.jit
def _nearest(i, in_size, out_size):
    """Source of NEAREST output i: Pillow adds the step up, so that ties go where its rounding errors lead."""
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
    """Offset in bytes, from the image's start, of coordinate i of the crop as it is after the NEAREST steps."""
    for step in tl.static_range(3):
        out_size = tl.load(region + _NEAREST_WIDTH_3 - 2 * step + axis).to(tl.int32)
        in_size = tl.load(region + _NEAREST_WIDTH_3 - 2 * step - 2 + axis).to(tl.int32)
        if in_size != out_size:
            i = _nearest(i, in_size, out_size)
    return (i + tl.load(region + _LEFT + axis)) * tl.load(region + STRIDES + axis)


@triton.jit
def _weight(tap, first, center, inverse, bilinear):
    """Unnormalised weight of a tap: the triangle, or the cubic of a = -1/2, in Pillow's order of operations."""
    x = tl.abs((tap + first - center + 0.5) * inverse)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    cubic = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(bilinear, tl.where(x < 1.0, 1.0 - x, 0.0), cubic)


@triton.jit
def _taps(region, axis, at, valid):
    """First tap, number of taps, centre and weight sum of the outputs at window coordinates `at`; 1/filter scale."""
    in_size = tl.load(region + _NEAREST_WIDTH_3 + axis).to(tl.int32)
    out_size = tl.load(region + _RESIZED_WIDTH + axis).to(tl.int32)
    bilinear = tl.load(region + _FILTER) == _BILINEAR
    scale = in_size.to(tl.float64) / out_size.to(tl.float64)
    filter_scale = tl.where(scale < 1.0, 1.0, scale)
    inverse = 1.0 / filter_scale
    support = tl.where(bilinear, 1.0, 2.0) * filter_scale
    center = ((at + tl.load(region + _WINDOW_LEFT + axis)).to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int32), in_size) - first
    count = tl.where(valid, count, 0)
    total = tl.zeros_like(center)
    for tap in range(0, tl.max(count)):
        total += tl.where(tap < count, _weight(tap, first, center, inverse, bilinear), 0.0)
    return first, count, center, total, inverse


@triton.jit
def _band(region, start, begin, first, count, center, total, inverse, CHUNK: tl.constexpr):
    """int32 [CHUNK, outputs]: coefficients of source coordinates start… for every output; `begin` is the least first tap."""
    bilinear = tl.load(region + _FILTER) == _BILINEAR
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
def _digits(band):
    """band = low + 4096·high, both exact in float16."""
    low = ((band + 2048) & 4095) - 2048
    return low.to(tl.float16), ((band - low) >> 12).to(tl.float16)


@triton.jit
def _exact_dot(a_low, a_high, b_low, b_high, total):
    """total + a·b in integers; one operand is given by digits, the other twice."""
    return total + tl.dot(a_low, b_low).to(tl.int32) + (tl.dot(a_high, b_high).to(tl.int32) << 12)


@triton.jit
def _centred_byte(total):
    """Pillow's rounding of a sum, minus 128: the next product's operand."""
    byte = (total + _HALF) >> _BITS
    return tl.minimum(tl.maximum(byte, 0), 255) - ZERO


@triton.jit
def _read(pointers, mask):
    return (tl.load(pointers, mask=mask, other=ZERO).to(tl.int32) - ZERO).to(tl.float16)


@triton.jit
def resample(region, outer_axis, outer, outer_valid, inner, inner_valid, CHUNK: tl.constexpr):
    """Pixels minus 128 at window coordinates outer × inner: three int32 tiles, red, green and blue; 0 where invalid."""
    inner_axis = 1 - outer_axis
    first_o, count_o, center_o, total_o, inverse_o = _taps(region, outer_axis, outer, outer_valid)
    first_i, count_i, center_i, total_i, inverse_i = _taps(region, inner_axis, inner, inner_valid)
    begin_o = tl.min(tl.where(count_o > 0, first_o, _FAR))
    begin_i = tl.min(tl.where(count_i > 0, first_i, _FAR))
    end_o, end_i = tl.max(tl.where(count_o > 0, first_o + count_o, 0)), tl.max(tl.where(count_i > 0, first_i + count_i, 0))
    image = tl.load(region + PIXELS).to(tl.pointer_type(tl.uint8))
    channel = tl.load(region + STRIDES + 2)

    red = tl.zeros([outer.shape[0], inner.shape[0]], tl.int32)
    green, blue = red, red
    for o in range(begin_o, end_o, CHUNK):
        band_o = tl.trans(_band(region, o, begin_o, first_o, count_o, center_o, total_o, inverse_o, CHUNK))
        low_o, high_o = _digits(band_o)
        at_o = o + tl.arange(0, CHUNK)
        rows = image + _source(region, outer_axis, at_o)
        line_r = tl.zeros([CHUNK, inner.shape[0]], tl.int32)
        line_g, line_b = line_r, line_r
        for i in range(begin_i, end_i, CHUNK):
            band_i = _band(region, i, begin_i, first_i, count_i, center_i, total_i, inverse_i, CHUNK)
            low_i, high_i = _digits(band_i)
            at_i = i + tl.arange(0, CHUNK)
            pointers = rows[:, None] + _source(region, inner_axis, at_i)[None, :]
            mask = (at_o < end_o)[:, None] & (at_i < end_i)[None, :]
            # Bytes are centred so that sums stay below 2^24; what that takes away is added here.
            offset = (tl.sum(band_i, axis=0) * ZERO)[None, :]
            pixels = _read(pointers, mask)
            line_r = _exact_dot(pixels, pixels, low_i, high_i, line_r + offset)
            pixels = _read(pointers + channel, mask)
            line_g = _exact_dot(pixels, pixels, low_i, high_i, line_g + offset)
            pixels = _read(pointers + 2 * channel, mask)
            line_b = _exact_dot(pixels, pixels, low_i, high_i, line_b + offset)
        offset = (tl.sum(band_o, axis=1) * ZERO)[:, None]
        line = _centred_byte(line_r).to(tl.float16)
        red = _exact_dot(low_o, high_o, line, line, red + offset)
        line = _centred_byte(line_g).to(tl.float16)
        green = _exact_dot(low_o, high_o, line, line, green + offset)
        line = _centred_byte(line_b).to(tl.float16)
        blue = _exact_dot(low_o, high_o, line, line, blue + offset)

    valid = outer_valid[:, None] & inner_valid[None, :]
    red = tl.where(valid, _centred_byte(red), 0)
    green = tl.where(valid, _centred_byte(green), 0)
    blue = tl.where(valid, _centred_byte(blue), 0)
    return red, green, blue
