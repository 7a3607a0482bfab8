"""Pictures of a live conversation: what the model is given for them, and boxes in the coordinates that models write."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vpt_kernels.processor import QwenVLImageProcessor

COORDINATES = ("pixels", "relative", "thousandths", "resized")


class Pictures:
    """Decoded pictures → the arguments of a model: embeddings by our kernels, or what its own processor makes.

    Ours stand in for the Pillow-based processors only, with which they agree bit for bit.
    """

    def __init__(self, model: nn.Module, image_processor: Any, kernels: bool) -> None:
        self._theirs, self._device = image_processor, model.device
        self._ours = None
        if kernels and type(image_processor).__name__.endswith("Pil"):
            try:
                self._ours = QwenVLImageProcessor.of(model, image_processor)
            except ValueError:
                pass  # another family, or a processor that does something else: its own code is right by definition

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """`pixel_values` and `image_grid_thw` int64 [1, 3] of one picture, uint8 [height, width, 3]."""
        if self._ours is not None:
            return self._ours(pixels)
        made = self._theirs(images=[Image.fromarray(pixels.cpu().numpy())], return_tensors="pt")
        return {name: made[name].to(self._device) for name in ("pixel_values", "image_grid_thw")}

    def resized(self, grid: Sequence[int]) -> tuple[int, int]:
        """(height, width) of a picture as the model saw it, from its grid (frames, rows, columns) in patches."""
        return grid[1] * self._theirs.patch_size, grid[2] * self._theirs.patch_size


def box_in_pixels(
    box: Sequence[float], size: tuple[int, int], coordinates: str, resized: tuple[int, int], clip: bool = False
) -> tuple[int, int, int, int]:
    """The whole pixels that a box (left, top, right, bottom) touches, of a picture of `size` (height, width).

    clip: cut what lies outside, and exchange borders in the wrong order, as models write them; else they are errors.

    Raises:
        ValueError: not four finite numbers, unknown coordinates, an empty box, or one that leaves the picture.
    """
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates is {coordinates!r}; give one of {COORDINATES}")
    try:
        numbers = torch.tensor([float(value) for value in box], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"box is {box!r}; it must be four numbers: left, top, right, bottom") from error
    if numbers.shape != (4,) or not torch.isfinite(numbers).all():
        raise ValueError(f"box is {box!r}; it must be four finite numbers: left, top, right, bottom")
    height, width = size
    units = {"pixels": (width, height), "relative": (1, 1), "thousandths": (1000, 1000), "resized": resized[::-1]}
    across, down = units[coordinates]
    scale = torch.tensor([width / across, height / down] * 2, dtype=torch.float64)
    left, top, right, bottom = (numbers * scale).tolist()
    if clip:
        (left, right), (top, bottom) = sorted((left, right)), sorted((top, bottom))
        left, right = (min(max(x, 0), width) for x in (left, right))
        top, bottom = (min(max(y, 0), height) for y in (top, bottom))
    whole = floor(left), floor(top), ceil(right), ceil(bottom)
    if not (0 <= whole[0] < whole[2] <= width and 0 <= whole[1] < whole[3] <= height):
        raise ValueError(
            f"box {tuple(box)} in {coordinates} covers pixels {whole} of a picture of {width}×{height}: it must lie "
            "inside and hold at least one pixel"
        )
    return whole
