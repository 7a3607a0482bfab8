"""Device functions of the Triton backend: a tile of resampled pixels, bit-exact with Pillow.

A pass along one axis is a product with a banded matrix of 22-bit coefficients. The matrix is split into two 12-bit
slices that float16 holds exactly, and multiplied on tensor cores: a product with a centred byte is at most 2^18, the
sum of a chunk of at most 64 of them at most 2^24, so every float32 sum is an exact integer. Pillow's rounding to a byte
after each pass then happens in int32.

Both axes are treated alike. "Inner" is the axis that is resampled first (0: columns, 1: rows), "outer" the other one;
the plan's columns come in (x, y) pairs, so that an axis is an offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vpt_kernels.roi_patch_embed.geometry import PIXEL_SCALE, PIXEL_ZERO, Column
from vpt_kernels.roi_patch_embed.triton_staging import PIXELS, STRIDES
from vpt_kernels.roi_patch_embed.triton_tables import axis_taps, band, crop_coordinate, field

_LEFT = tl.constexpr(int(Column.LEFT))
_GRID_WIDTH = tl.constexpr(int(Column.GRID_WIDTH))
_MERGE_SIZE = tl.constexpr(int(Column.MERGE_SIZE))
ZERO = tl.constexpr(PIXEL_ZERO)
_PIXEL = tl.constexpr(1.0 / PIXEL_SCALE)

_BITS = tl.constexpr(32 - 8 - 2)
_HALF = tl.constexpr(1 << 21)
_FAR = tl.constexpr(1 << 30)


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
def _source(region, axis, i, tables_ptr):
    """Return the byte offset, from the image's start, of coordinate i of the crop as it is after the NEAREST steps."""
    i = crop_coordinate(region, axis, i, tables_ptr)
    return (i + field(region, _LEFT + axis)) * tl.load(region + STRIDES + axis)


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
def resample(region, tables_ptr, outer_axis, outer, outer_valid, inner, inner_valid, CHUNK: tl.constexpr):
    """Return the pixels at window coordinates inner × outer, minus 128.

    Args:
        tables_ptr: the coefficients, as `table_kernel` has written them; None: they are computed here.

    Returns:
        int32 [4·inner, outer], rows in (channel, inner) order; a fourth channel and invalid pixels are 0.
    """
    INNER: tl.constexpr = inner.shape[0]
    OUTER: tl.constexpr = outer.shape[0]
    inner_axis = 1 - outer_axis
    first_o, count_o, given_o = axis_taps(region, outer_axis, outer, outer_valid, tables_ptr)
    first_i, count_i, given_i = axis_taps(region, inner_axis, inner, inner_valid, tables_ptr)
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
        line_ptr = image_ptr + _source(region, outer_axis, at_o, tables_ptr)
        line = tl.zeros([4 * CHUNK, INNER], tl.int32)
        for i in range(begin_i, end_i, CHUNK):
            at_i = i + tl.arange(0, CHUNK)
            mask = (at_i < end_i)[:, None] & ((at_o < end_o) & (channel < 3))[None, :]
            # Where strides are unknown the compiler lets lanes run along the first dimension: the image's rows.
            source = _source(region, inner_axis, at_i, tables_ptr)
            pixels = tl.load(line_ptr[None, :] + source[:, None], mask=mask, other=ZERO)
            pixels = (pixels.to(tl.int32) - ZERO).to(tl.float16).trans()
            matrix = band(region, i, begin_i, first_i, count_i, given_i, tables_ptr, CHUNK)
            line = _filtered(pixels, matrix, line)
        line = _centred_byte(line).to(tl.float16)
        line = line.reshape(4, CHUNK, INNER).trans(0, 2, 1).reshape(4 * INNER, CHUNK)
        matrix = band(region, o, begin_o, first_o, count_o, given_o, tables_ptr, CHUNK)
        out = _filtered(line, matrix, out)
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
