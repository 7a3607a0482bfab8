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

_BICUBIC = FILTERS.index("bicubic")
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
    shapes = [(*image.shape[:2], *image.stride(), image.data_ptr()) for image in images]
    for number, region in enumerate(plan.tolist()):
        # By position, in the order of `Column`: named look-ups would take most of the call.
        (
            image, _, _, left, top, width, height, w1, h1, w2, h2, w3, h3, out_w, out_h, kind, vertical_first,
            window_left, window_top, grid_w, grid_h, patch, merge, row,
        ) = region  # fmt: skip
        # The kernels follow the table without looking, so nothing may pass that leads beyond a tensor.
        if not (
            0 <= image < len(shapes)
            and 0 <= left <= shapes[image][1] - width
            and 0 <= top <= shapes[image][0] - height
            and min(width, height, w1, h1, w2, h2, w3, h3, out_w, out_h, grid_w, grid_h, patch, merge) > 0
            and max(w1, h1, w2, h2, w3, h3, out_w, out_h, grid_w * patch, grid_h * patch) <= MAX_SIZE
            and grid_w % merge == grid_h % merge == 0
            and 3 * patch * patch == row_bytes
            and row == first_row
            and 0 <= kind < len(FILTERS)
            and 0 <= vertical_first <= 1
            and 0 <= window_left < out_w
            and 0 <= window_top < out_h
        ):
            raise ValueError(
                f"plan: row {number} is not a region of these images and this patch size; use plan_regions"
            )
        _, _, stride_y, stride_x, channel, address = shapes[image]
        if in_patches:
            unit, pitch_x, pitch_y = 1, tile, tile
        else:
            support = 4 if kind == _BICUBIC else 2
            unit, pitch_x, pitch_y = patch, _pitch(w3 / out_w, support, tile), _pitch(h3 / out_h, support, tile)
        records += region
        records += (tiles, address, stride_x, stride_y, channel, pitch_x, pitch_y)
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
