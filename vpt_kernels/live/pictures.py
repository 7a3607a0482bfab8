"""Pictures of a live conversation: what the model is given for them, and boxes in the coordinates that models write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from vpt_kernels.checks import shown
from vpt_kernels.patch.rules import folded
from vpt_kernels.processor import QwenVLImageProcessor, plain_patch_embed
from vpt_kernels.roi_patch_embed.boxes import clip_boxes
from vpt_kernels.roi_patch_embed.geometry import plan_regions


class Pictures:
    """Decoded pictures → the arguments of a model: embeddings by our kernels, or what its own processor makes.

    Ours stand in for the Pillow-based processors only, with which they agree bit for bit.
    """

    def __init__(self, model: Any, image_processor: Any, kernels: bool) -> None:
        self._model, self._theirs = model, image_processor
        self._kernels = kernels and type(image_processor).__name__.endswith("Pil")

    def prepared(self, pixels: Tensor) -> tuple[tuple[int, ...], dict[str, Tensor] | None]:
        """Return the grid (frames, rows, columns) of a picture, uint8 [height, width, 3], and its `inputs` where no
        weights are in them: embeddings wait for the weights of the call that they are fed in.
        """
        ours = self._ours()
        if ours is not None:
            height, width = pixels.shape[:2]
            return (1, *plan_regions([(height, width)], [(0, 0, 0, width, height)], ours.policy).grids[0]), None
        made = self.inputs(pixels)
        return tuple(made["image_grid_thw"][0].tolist()), made

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return `pixel_values` and `image_grid_thw` int64 [1, 3] of one picture, uint8 [height, width, 3]."""
        ours = self._ours()
        if ours is not None:
            return ours(pixels)
        made = self._theirs(images=[Image.fromarray(pixels.cpu().numpy())], return_tensors="pt")
        return {name: made[name].to(self._model.device) for name in ("pixel_values", "image_grid_thw")}

    def _ours(self) -> QwenVLImageProcessor | None:
        """Return whether our kernels embed; asked for every picture: weights, hooks and adapters change meanwhile."""
        if not self._kernels:
            return None
        try:
            weights = list(plain_patch_embed(self._model).proj.parameters())
            return folded(self, weights, lambda: QwenVLImageProcessor.of(self._model, self._theirs))
        except ValueError:
            return None  # another family, or a part that does something else: its own code is right by definition

    def resized(self, grid: Sequence[int]) -> tuple[int, int]:
        """Return (height, width) of a picture as the model saw it, from its grid (frames, rows, columns) in patches."""
        return grid[1] * self._theirs.patch_size, grid[2] * self._theirs.patch_size


def box_in_pixels(
    box: Sequence[float], size: tuple[int, int], coordinates: str, resized: tuple[int, int], clip: bool = False
) -> tuple[int, int, int, int]:
    """Return the whole pixels that a box (left, top, right, bottom) touches, of a picture of `size` (height, width).

    clip: cut what lies outside, and exchange borders in the wrong order, as models write them; else they are errors.

    Raises:
        TypeError, ValueError: not four finite numbers, unknown coordinates, an empty box, or one outside the picture.
    """
    scales = {"pixels": None, "relative": 1, "thousandths": 1000, "resized": resized[::-1]}
    if not isinstance(coordinates, str) or coordinates not in scales:
        raise ValueError(f"coordinates is {shown(coordinates)}; give one of {tuple(scales)}")
    if not isinstance(box, Iterable) or isinstance(box, (str, bytes)) or getattr(box, "ndim", 1) != 1:
        raise TypeError(f"box is {shown(box)}; it must be four numbers: left, top, right, bottom")
    if len(box := tuple(box)) != 4:
        raise ValueError(f"box is {box!r:.80}; it must be four numbers: left, top, right, bottom")
    ((_, *whole),), (changes,) = clip_boxes([(0, *box)], [size], scale=scales[coordinates])
    if wrong := {"widened"} & set(changes) if clip else {"swapped", "clipped", "widened"} & set(changes):
        reasons = {"swapped": "its borders are in the wrong order", "clipped": "a part lies outside"}
        reason = " and ".join(reasons.get(name, "it holds no pixel") for name in sorted(wrong))
        raise ValueError(
            f"box {box} in {coordinates} of a picture of {size[1]}×{size[0]} pixels: {reason}; see clip_boxes"
        )
    left, top, right, bottom = whole
    return left, top, right, bottom
