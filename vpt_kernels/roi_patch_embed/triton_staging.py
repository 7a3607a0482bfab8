"""What one call of the Triton backend hands to its kernels: a record per region, in one asynchronous copy."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from vpt_kernels.roi_patch_embed.geometry import FILTERS, MAX_SIZE, Column, padded_columns

FIRST_TILE = tl.constexpr(Column.COUNT + 0)
PIXELS = tl.constexpr(Column.COUNT + 1)
STRIDES = tl.constexpr(Column.COUNT + 2)
PITCH = tl.constexpr(Column.COUNT + 5)
TABLE = tl.constexpr(Column.COUNT + 7)
ROW_WORDS = tl.constexpr(Column.COUNT + 9)
SOURCES = tl.constexpr(Column.COUNT + 11)
FIRST_FILL = tl.constexpr(Column.COUNT + 13)
RECORD = tl.constexpr(Column.COUNT + 14)
"""A record is int64: the plan's columns, the region's first tile, its image's address and byte strides (x, y, channel),
the distance (x, y) of its tiles; per axis where in the table its rows begin, the words of a row, where its NEAREST
sources begin (−1: there are none); and its first program of the launch that fills the table."""

FILL_OUTPUTS = 16
"""Outputs, and NEAREST sources, of one program that fills the table: their taps are added one after the other."""

Region = namedtuple("Region", [column.name.lower() for column in Column if column != Column.COUNT])
"""A row of the plan, its columns by their names."""


class Staged(NamedTuple):
    """What a call hands to its kernels.

    Attributes:
        records: int64 [regions, RECORD] on the images' device.
        tiles, fills: programs that resample, and along the first grid axis those that fill the table.
        words: int32 numbers of the table.
    """

    records: Tensor
    tiles: int
    fills: int
    words: int


_BICUBIC = FILTERS.index("bicubic")
_CAPTURED: list[Tensor] = []
"""Pinned records that a CUDA graph's copy reads again in every replay. PyTorch does not say when a graph dies, and
memory that is reused before then would send a replay to another call's addresses: about 300 bytes a region and
captured call stay with the process."""


def stage(images: Sequence[Tensor], plan: Tensor, rows: int, row_bytes: int, tile: int, in_patches: bool) -> Staged:
    """Check the plan and put it where the kernels read it.

    Args:
        images, plan, rows, row_bytes: as the operators get them; `rows` −1 accepts any number.
        tile: side of a square tile, in pixels, of which it may use fewer; or, if `in_patches`, in patches.

    Nothing waits for the device.

    Raises:
        ValueError: the plan does not fit the images, the number of rows or the patch size.
    """
    records: list[int] = []
    first_row = tiles = fills = words = 0
    for number, row in enumerate(plan.tolist()):
        region = Region(*row)
        # The kernels follow the table without looking, so nothing may pass that leads beyond a tensor.
        _check_crop(number, region, images)
        _check_sizes(number, region)
        _check_rows(number, region, row_bytes, first_row)
        image = images[region.image]
        stride_y, stride_x, channel = image.stride()
        unit, pitch_x, pitch_y = (1, tile, tile) if in_patches else (region.patch_size, *_pitches(region, tile))
        records += row
        records += (tiles, image.data_ptr(), stride_x, stride_y, channel, pitch_x, pitch_y)
        axes, most, words = _tables(region, words)
        records += (*axes, fills)
        fills += -(-most // FILL_OUTPUTS)
        tiles += -(-region.grid_width * unit // pitch_x) * -(-region.grid_height * unit // pitch_y)
        first_row += region.grid_width * region.grid_height
    if rows >= 0 and rows != first_row:
        raise ValueError(f"the plan has {first_row} patches, not {rows}; use plan_regions")
    if tiles >= 1 << 31:
        raise ValueError(f"the plan needs {tiles} blocks; the limit is 2^31 - 1: split the boxes over calls")
    device = images[0].device if images else torch.device("cpu")
    if device.type != "cuda":
        return Staged(torch.tensor(records, dtype=torch.int64, device="cpu"), tiles, fills, words)
    pinned = torch.tensor(records, dtype=torch.int64, device="cpu", pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(pinned)
    return Staged(pinned.to(device, non_blocking=True), tiles, fills, words)


def patch_bytes(weight: Tensor, bias: Tensor) -> int:
    """Return the bytes of a patch that a folded weight is for, and check that the kernels can read weight and bias.

    Raises:
        ValueError: they are not as `fold_patch_weight` makes them.
    """
    columns = 3 * (bias.shape[1] - 1) ** 2
    if weight.shape[1] not in (columns, padded_columns(columns)) or weight.stride(1) != 1 or not bias.is_contiguous():
        raise ValueError(
            f"weight {tuple(weight.shape)} of strides {weight.stride()} and bias {tuple(bias.shape)} of strides "
            f"{bias.stride()}: a bias [2, p + 1, E] without gaps needs rows of 3·p·p adjacent numbers; use "
            "fold_patch_weight"
        )
    return columns


def _check_crop(number: int, region: Region, images: Sequence[Tensor]) -> None:
    """Check that the crop lies inside its image."""
    if not 0 <= region.image < len(images):
        raise ValueError(f"plan: row {number} names image {region.image} of {len(images)}; use plan_regions")
    height, width = images[region.image].shape[:2]
    across = 0 <= region.left <= width - region.width and region.width > 0
    down = 0 <= region.top <= height - region.height and region.height > 0
    if not (across and down):
        raise ValueError(
            f"plan: row {number} crops {region.width}×{region.height} pixels at ({region.left}, {region.top}) of an "
            f"image of {width}×{height}; plan again for these images"
        )


def _check_sizes(number: int, region: Region) -> None:
    """Check that the kernels can count the size of every step of the resampling, and that the window begins inside the
    last.
    """
    steps = region[Column.NEAREST_WIDTH_1 : Column.FILTER]
    if min(steps) < 1 or max(steps) > MAX_SIZE:
        raise ValueError(f"plan: row {number} resizes to {steps}; each must be 1…{MAX_SIZE}: use plan_regions")
    if not (0 <= region.filter < len(FILTERS) and 0 <= region.vertical_first <= 1):
        raise ValueError(
            f"plan: row {number} has filter {region.filter} and order {region.vertical_first}; use plan_regions"
        )
    if not (0 <= region.window_left < region.resized_width and 0 <= region.window_top < region.resized_height):
        raise ValueError(
            f"plan: row {number} has a window at ({region.window_left}, {region.window_top}) of "
            f"{region.resized_width}×{region.resized_height} pixels; use plan_regions"
        )


def _check_rows(number: int, region: Region, row_bytes: int, first_row: int) -> None:
    """Check that the patches are whole blocks, of the bytes of a row, and follow those of the region before."""
    patch, merge, grid = region.patch_size, region.merge_size, (region.grid_width, region.grid_height)
    if min(patch, merge, *grid) < 1 or max(grid) * patch > MAX_SIZE or any(size % merge for size in grid):
        raise ValueError(
            f"plan: row {number} has a grid of {grid} patches of {patch} in blocks of {merge}; they must be whole "
            f"blocks of at most {MAX_SIZE} pixels: use plan_regions"
        )
    if 3 * patch * patch != row_bytes:
        raise ValueError(f"plan: row {number} has patches of {3 * patch * patch} bytes, the rows {row_bytes}")
    if region.first_row != first_row:
        raise ValueError(f"plan: row {number} begins at patch {region.first_row}, not {first_row}; use plan_regions")


def _tables(region: Region, words: int) -> tuple[tuple[int, ...], int, int]:
    """Lay out the tables of a region's axes behind `words` others.

    Returns:
        ((begin x, begin y, words of a row x, y, sources x, y), rows or sources of the longer axis, words in all).
    """
    begins: list[int] = []
    rows: list[int] = []
    sources: list[int] = []
    most = 0
    for axis in (0, 1):
        inputs: int = region[Column.NEAREST_WIDTH_3 + axis]
        outputs: int = region[Column.RESIZED_WIDTH + axis]
        window = region[Column.GRID_WIDTH + axis] * region.patch_size
        valid = min(outputs - region[Column.WINDOW_LEFT + axis], window)
        radius = 2 if region.filter == _BICUBIC else 1
        row = 2 + min(inputs, 2 * (radius * max(inputs, outputs) // outputs + 1) + 1)
        begins.append(words)
        rows.append(row)
        words += valid * row
        sizes = region[Column.WIDTH + axis : Column.NEAREST_WIDTH_3 + axis + 1 : 2]
        steps = len(set(sizes)) > 1
        sources.append(words if steps else -1)
        words += inputs if steps else 0
        most = max(most, valid, inputs if steps else 0)
    return (*begins, *rows, *sources), most, words


def _pitches(region: Region, tile: int) -> tuple[int, int]:
    """Return the distance of tiles, (x, y), in pixels of the window."""
    support = 4 if region.filter == _BICUBIC else 2
    across, down = region.nearest_width_3 / region.resized_width, region.nearest_height_3 / region.resized_height
    return _pitch(across, support, tile), _pitch(down, support, tile)


def _pitch(scale: float, support: int, tile: int) -> int:
    """Return the outputs of a tile whose taps span at most `tile` pixels, so that one product does; all where these are
    few.
    """
    outputs = int((tile - 1 - support * max(scale, 1.0)) / scale) + 1
    return min(outputs, tile) if 2 * outputs >= tile else tile
