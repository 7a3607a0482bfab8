"""Plain PyTorch: Pillow's two-pass uint8 resampling, patches in merge-block order, folded GEMM.

Runs on every device; coefficients are computed on the host in float64 and the passes in int32, both exactly as
Pillow's `src/libImaging/Resample.c` and `Geometry.c` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vpt_kernels.library import implement
from vpt_kernels.roi_patch_embed.geometry import FILTERS, PIXEL_SCALE, PIXEL_ZERO, Column

PRECISION_BITS = 32 - 8 - 2


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))


def _triangle(x: Tensor) -> Tensor:
    x = x.abs()
    return torch.where(x < 1.0, 1.0 - x, torch.zeros_like(x))


def resampling_coefficients(in_size: int, out_size: int, name: str) -> tuple[Tensor, Tensor]:
    """Return Pillow's taps of one axis.

    Returns:
        (first [out_size] int64, weights [out_size, taps] int32): output i is Σ_t weights[i, t]·in[first[i] + t],
        with 22 fractional bits; taps beyond the support are zero.
    """
    kernel, radius = (_bicubic, 2.0) if name == "bicubic" else (_triangle, 1.0)
    scale = in_size / out_size
    filter_scale = max(scale, 1.0)
    support = radius * filter_scale
    taps = math.ceil(support) * 2 + 1
    center = (torch.arange(out_size, dtype=torch.float64, device="cpu") + 0.5) * scale
    # .to(int64) truncates toward zero, as the C cast does.
    first = (center - support + 0.5).to(torch.int64).clamp(min=0)
    count = (center + support + 0.5).to(torch.int64).clamp(max=in_size) - first
    tap = torch.arange(taps, dtype=torch.float64, device="cpu")
    weights = kernel((tap + first[:, None] - center[:, None] + 0.5) * (1.0 / filter_scale))
    weights = torch.where(tap < count[:, None], weights, 0.0)
    total = torch.zeros(out_size, dtype=torch.float64, device="cpu")
    for t in range(taps):  # the C loop's order of additions
        total = total + weights[:, t]
    weights = torch.where(total[:, None] != 0, weights / total[:, None], weights)
    fixed = weights * (1 << PRECISION_BITS)
    return first, torch.where(weights < 0, fixed - 0.5, fixed + 0.5).to(torch.int32)


def nearest_indices(in_size: int, out_size: int) -> Tensor:
    """Return Pillow's NEAREST source index of every output pixel; its double sum is accumulated, not multiplied."""
    step = in_size / out_size
    position = step * 0.5
    indices = []
    for _ in range(out_size):
        indices.append(min(int(position), in_size - 1))
        position += step
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def _resample_rows(image: Tensor, out_size: int, name: str) -> Tensor:
    """Resample uint8 [n, m, c] along dim 0 in one pass to uint8 [out_size, m, c]."""
    in_size = image.shape[0]
    if in_size == out_size:
        return image
    first, weights = resampling_coefficients(in_size, out_size, name)
    first, weights = first.to(image.device), weights.to(image.device)
    total = torch.full((out_size, *image.shape[1:]), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=image.device)
    for t in range(weights.shape[1]):
        source = image[(first + t).clamp(max=in_size - 1)].to(torch.int32)
        total += weights[:, t, None, None] * source
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


def _region_pixels(images: Sequence[Tensor], row: list[int]) -> Tensor:
    """Return the window of one region, uint8 [window_h, window_w, 3]; padding is `PIXEL_ZERO`."""
    c = Column
    top, left = row[c.TOP], row[c.LEFT]
    pixels = images[row[c.IMAGE]][top : top + row[c.HEIGHT], left : left + row[c.WIDTH]]
    steps = row[c.NEAREST_WIDTH_1 : c.RESIZED_WIDTH]
    for width, height in zip(steps[0::2], steps[1::2]):
        if (height, width) != tuple(pixels.shape[:2]):
            ys = nearest_indices(pixels.shape[0], height).to(pixels.device)
            xs = nearest_indices(pixels.shape[1], width).to(pixels.device)
            pixels = pixels[ys][:, xs]
    name = FILTERS[row[c.FILTER]]
    passes = [(1, row[c.RESIZED_WIDTH]), (0, row[c.RESIZED_HEIGHT])]
    for dim, size in reversed(passes) if row[c.VERTICAL_FIRST] else passes:
        pixels = _resample_rows(pixels.transpose(0, dim), size, name).transpose(0, dim)
    patch = row[c.PATCH_SIZE]
    height, width = row[c.GRID_HEIGHT] * patch, row[c.GRID_WIDTH] * patch
    pixels = pixels[row[c.WINDOW_TOP] :, row[c.WINDOW_LEFT] :][:height, :width]
    window = pixels.new_full((height, width, 3), PIXEL_ZERO)
    window[: pixels.shape[0], : pixels.shape[1]] = pixels
    return window


def roi_patches(images: Sequence[Tensor], plan: Tensor, rows: int, row_bytes: int) -> Tensor:
    device = images[0].device if images else plan.device
    out = torch.empty((rows, row_bytes), dtype=torch.uint8, device=device)
    for row in plan.tolist():
        grid_w, grid_h, p, m = row[Column.GRID_WIDTH : Column.FIRST_ROW]
        # [H/m, m, p, W/m, m, p, 3] → (H/m, W/m, m, m) patches of (y, x, channel) bytes
        blocks = _region_pixels(images, row).reshape(grid_h // m, m, p, grid_w // m, m, p, 3)
        patches = blocks.permute(0, 3, 1, 4, 2, 5, 6).reshape(grid_h * grid_w, row_bytes)
        first = row[Column.FIRST_ROW]
        out[first : first + grid_h * grid_w] = patches
    return out


def _bias_rows(plan: Tensor, bias: Tensor) -> Tensor:
    """Return the float32 bias of every patch row, [rows, E], from the table of biases by valid rows and columns."""
    patch = bias.shape[1] - 1
    full = bias[0, patch]
    parts = []
    for row in plan.tolist():
        c = Column
        grid_h, grid_w, m = row[c.GRID_HEIGHT], row[c.GRID_WIDTH], row[c.MERGE_SIZE]
        valid_h = row[c.RESIZED_HEIGHT] - row[c.WINDOW_TOP]
        valid_w = row[c.RESIZED_WIDTH] - row[c.WINDOW_LEFT]
        by_row = (valid_h - torch.arange(grid_h, device="cpu") * patch).clamp(0, patch)[:, None].expand(grid_h, grid_w)
        by_column = (valid_w - torch.arange(grid_w, device="cpu") * patch).clamp(0, patch)[None].expand(grid_h, grid_w)
        index = torch.where(by_row < patch, by_row, (patch + 1) + by_column)
        index = index.reshape(grid_h // m, m, grid_w // m, m).transpose(1, 2).reshape(-1)
        parts.append(bias.flatten(0, 1)[index.to(bias.device)])
    return torch.cat(parts) if parts else full.new_empty((0, full.shape[0]))


def roi_patch_embed(images: Sequence[Tensor], plan: Tensor, rows: int, weight: Tensor, bias: Tensor) -> Tensor:
    columns = 3 * (bias.shape[1] - 1) ** 2
    patches = roi_patches(images, plan, rows, columns)
    # Product and bias cancel on flat images: rounding the product first would cost most of the result's bits.
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    centred = (patches.to(wide) - PIXEL_ZERO) / PIXEL_SCALE
    product = torch.nn.functional.linear(centred, weight[:, :columns].to(wide))
    return (product + _bias_rows(plan, bias)).to(weight.dtype)


def roi_patch_embed_into(
    images: Sequence[Tensor], plan: Tensor, weight: Tensor, bias: Tensor, out: Tensor, row: int
) -> None:
    rows = int((plan[:, Column.GRID_HEIGHT] * plan[:, Column.GRID_WIDTH]).sum())
    out[row : row + rows] = roi_patch_embed(images, plan, rows, weight, bias)


implement("roi_patches", "reference", roi_patches)
implement("roi_patch_embed", "reference", roi_patch_embed)
implement("roi_patch_embed_into", "reference", roi_patch_embed_into)
