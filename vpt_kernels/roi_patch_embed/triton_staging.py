"""What one call of the Triton backend hands to its kernels: a record per region, in one asynchronous copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from vpt_kernels.roi_patch_embed.geometry import FILTERS, MAX_SIZE, Column

FIRST_TILE = tl.constexpr(Column.COUNT + 0)
PIXELS = tl.constexpr(Column.COUNT + 1)
STRIDES = tl.constexpr(Column.COUNT + 2)
PITCH = tl.constexpr(Column.COUNT + 5)
RECORD = tl.constexpr(Column.COUNT + 7)
"""A record is int64: the plan's columns, the region's first tile, its image's address and byte strides (x, y, channel),
and the distance (x, y) of its tiles."""

_CAPTURED: list[Tensor] = []
"""Pinned records that a CUDA graph's copy reads again in every replay. PyTorch does not say when a graph dies, and
memory that is reused before then would send a replay to another call's addresses: about 250 bytes a region and
captured call stay with the process."""


def stage(
    images: Sequence[Tensor], plan: Tensor, rows: int, row_bytes: int, tile: int, in_patches: bool
) -> tuple[Tensor, int]:
    """Check the plan and put it where the kernels read it.

    Args:
        images, plan, rows, row_bytes: as the operators get them; `rows` −1 accepts any number.
        tile: side of a square tile, in pixels, of which it may use fewer; or, if `in_patches`, in patches.

    Returns:
        (records int64 [regions, RECORD] on the images' device, number of tiles). Nothing waits for the device.

    Raises:
        ValueError: the plan does not fit the images, the number of rows or the patch size.
    """
    records: list[int] = []
    first_row = tiles = 0
    c = Column
    for number, region in enumerate(plan.tolist()):
        _check_region(region, images, row_bytes, first_row, number)
        image = images[region[c.IMAGE]]
        grid_w, grid_h = region[c.GRID_WIDTH], region[c.GRID_HEIGHT]
        stride_y, stride_x, channel = image.stride()
        if in_patches:
            unit, pitch_x, pitch_y = 1, tile, tile
        else:
            unit, radius = region[c.PATCH_SIZE], 4 if FILTERS[region[c.FILTER]] == "bicubic" else 2
            pitch_x = _pitch(region[c.NEAREST_WIDTH_3] / region[c.RESIZED_WIDTH], radius, tile)
            pitch_y = _pitch(region[c.NEAREST_HEIGHT_3] / region[c.RESIZED_HEIGHT], radius, tile)
        records += (*region, tiles, image.data_ptr(), stride_x, stride_y, channel, pitch_x, pitch_y)
        tiles += -(-grid_w * unit // pitch_x) * -(-grid_h * unit // pitch_y)
        first_row += grid_w * grid_h
    if rows >= 0 and rows != first_row:
        raise ValueError(f"the plan has {first_row} patches, not {rows}; use plan_regions")
    if tiles >= 1 << 31:
        raise ValueError(f"the plan needs {tiles} blocks; the limit is 2^31 - 1: split the boxes over calls")
    device = images[0].device if images else torch.device("cpu")
    if device.type != "cuda":
        return torch.tensor(records, dtype=torch.int64), tiles
    pinned = torch.tensor(records, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(pinned)
    return pinned.to(device, non_blocking=True), tiles


def _pitch(scale: float, support: int, tile: int) -> int:
    """Outputs of a tile whose taps span at most `tile` pixels, so that one product does; all where these are few."""
    outputs = int((tile - 1 - support * max(scale, 1.0)) / scale) + 1
    return min(outputs, tile) if 2 * outputs >= tile else tile


def _check_region(row: Sequence[int], images: Sequence[Tensor], row_bytes: int, first_row: int, number: int) -> None:
    # The kernels follow the table without looking, so nothing may pass that leads beyond a tensor.
    c = Column
    if 0 <= row[c.IMAGE] < len(images):
        height, width, _ = images[row[c.IMAGE]].shape
        p, m = row[c.PATCH_SIZE], row[c.MERGE_SIZE]
        sizes = row[c.NEAREST_WIDTH_1 : c.FILTER]
        grid_w, grid_h = row[c.GRID_WIDTH], row[c.GRID_HEIGHT]
        if (
            0 <= row[c.LEFT] <= width - row[c.WIDTH]
            and 0 <= row[c.TOP] <= height - row[c.HEIGHT]
            and min(row[c.WIDTH], row[c.HEIGHT], *sizes, p, m, grid_w, grid_h) > 0
            and max(*sizes, grid_w * p, grid_h * p) <= MAX_SIZE
            and grid_w % m == grid_h % m == 0
            and 3 * p * p == row_bytes
            and row[c.FIRST_ROW] == first_row
            and 0 <= row[c.FILTER] < len(FILTERS)
            and 0 <= row[c.VERTICAL_FIRST] <= 1
            and 0 <= row[c.WINDOW_LEFT] < row[c.RESIZED_WIDTH]
            and 0 <= row[c.WINDOW_TOP] < row[c.RESIZED_HEIGHT]
        ):
            return
    raise ValueError(f"plan: row {number} is not a region of these images and this patch size; use plan_regions")
