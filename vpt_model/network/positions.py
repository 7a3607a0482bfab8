"""Rotary positions as pure functions: offset-aware M-RoPE for the language model, 2-D for the vision tower.

Source: Qwen2-VL as in transformers (`get_rope_index`, `get_vision_position_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mrope_positions(
    ids: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    start: int,
    image_pad: int,
    merge_size: int = 2,
) -> tuple[torch.Tensor, int]:
    """Return the positions of a chunk of one conversation that begins at position `start`.

    Text tokens, and the pads of re-encoded images, advance all three axes by one. A run of `image_pad` stands for one
    image of merged grid (rows, columns): its token (r, c) sits at (p, p + r, p + c), and the text behind it continues
    at p + max(rows, columns). Continuing a cache with `start` = its next position therefore equals recomputing the
    positions of the whole sequence.

    ids: int64 [T] on the CPU. grids: (height, width) in patches of each image of the chunk, in order.
    Returns positions int64 [3, T] (axes: temporal, height, width) and the position of the token that follows.
    Raises ValueError if the runs of `image_pad` in `ids` are not exactly those that `grids` announce.
    """
    positions = torch.empty(3, ids.numel(), dtype=torch.int64, device="cpu")
    pads = (ids == image_pad).nonzero().flatten().tolist()
    expected = sum(height * width for height, width in grids) // merge_size**2
    if len(pads) != expected:
        raise ValueError(
            f"the chunk has {len(pads)} image tokens (id {image_pad}) but the {len(grids)} grids {list(grids)} make "
            f"{expected}: give one (height, width) in patches per image of this chunk only"
        )
    position, cursor, used = start, 0, 0
    for height, width in grids:
        if height < merge_size or width < merge_size or height % merge_size or width % merge_size:
            raise ValueError(
                f"grid {(height, width)} is not a positive multiple of merge_size {merge_size} on each axis"
            )
        rows, columns = height // merge_size, width // merge_size
        first, last = pads[used], pads[used + rows * columns - 1]
        if last - first != rows * columns - 1:
            raise ValueError(
                f"the run of image tokens at index {first} is interrupted before the {rows * columns} tokens of grid "
                f"{(height, width)}: order the grids as the images appear in the text"
            )
        positions[:, cursor:first] = torch.arange(position, position + first - cursor, device="cpu")
        position += first - cursor
        cursor = last + 1
        image = positions[:, first:cursor].view(3, rows, columns)
        image[0] = position
        image[1] = position + torch.arange(rows, device="cpu")[:, None]
        image[2] = position + torch.arange(columns, device="cpu")
        position += max(rows, columns)
        used += rows * columns
    positions[:, cursor:] = torch.arange(position, position + ids.numel() - cursor, device="cpu")
    return positions, position + ids.numel() - cursor


def vision_positions(grids: Sequence[tuple[int, int]], merge_size: int = 2) -> torch.Tensor:
    """Return row and column of every patch of the given images, int64 [N, 2], in the vision tower's merge-block order.

    The merge_size x merge_size patches of a block are adjacent, blocks are row-major.

    grids: (height, width) in patches of each image, multiples of merge_size.
    """
    coordinates = []
    for height, width in grids:
        row = torch.arange(height, device="cpu")[:, None].expand(height, width)
        column = torch.arange(width, device="cpu")[None, :].expand(height, width)
        blocks = torch.stack([row, column], dim=-1).view(
            height // merge_size, merge_size, width // merge_size, merge_size, 2
        )
        coordinates.append(blocks.transpose(1, 2).reshape(-1, 2))
    return torch.cat(coordinates) if coordinates else torch.empty(0, 2, dtype=torch.int64, device="cpu")
