"""Boxes as models and people emit them, into boxes that `plan_regions` takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from vpt_kernels.checks import shown
from vpt_kernels.roi_patch_embed.geometry import MAX_SIZE, UNORDERED, image_sizes, listed_boxes

FORM = "(image, left, top, right, bottom)"


class ClippedBoxes(NamedTuple):
    """What `clip_boxes` returns, one entry per box in each list.

    Attributes:
        boxes: (image, left, top, right, bottom) in whole pixels, right and bottom exclusive, inside the image and not
            empty.
        changes: what was done to each box, in this order and empty where nothing was: "scaled" (from normalised
            coordinates), "swapped" (an edge lay beyond its opposite), "rounded" (outwards, to whole pixels), "clipped"
            (a part lay outside the image), "widened" (it held no pixel and was given the nearest one).
    """

    boxes: list[tuple[int, int, int, int, int]]
    changes: list[tuple[str, ...]]


def clip_boxes(
    boxes: Sequence[Sequence[float]],
    sizes: Sequence[tuple[int, int]],
    *,
    scale: float | tuple[float, float] | None = None,
) -> ClippedBoxes:
    """Make boxes legal for `plan_regions`, and say of each what was changed.

    Args:
        boxes: (image, left, top, right, bottom) per box: index into `sizes`, then integers or floats, which may lie
            outside the image, be swapped or empty.
        sizes: (height, width) of each image, in pixels.
        scale: None: coordinates are pixels. Otherwise the coordinate that stands for the right and the lower edge of
            the image: 1 for fractions, 1000 for the grid of Qwen2-VL and Qwen3-VL, (width, height) of the resized image
            for the absolute coordinates of Qwen2.5-VL. It is never guessed.

    Returns:
        ClippedBoxes: as many boxes as were given, in their order. A box that lies outside its image altogether becomes
        the nearest pixel of the edge: whoever would rather drop it finds "widened" among its changes.

    Raises:
        TypeError: a box is not five numbers, or an index not an integer.
        ValueError: an unknown image, an image without a pixel, a coordinate that is NaN or infinite, or a scale that is
            not positive.
    """
    sizes = image_sizes(sizes)
    scales = _scales(scale)
    found = ClippedBoxes([], [])
    for number, box in enumerate(listed_boxes(boxes)):
        image, *edges = _numbers(number, box)
        if not image.is_integer():
            raise TypeError(f"box {number} names image {image}; give an integer, as in {FORM}")
        image = int(image)
        if not 0 <= image < len(sizes):
            raise ValueError(f"box {number} names image {image}; there are {len(sizes)} images")
        height, width = sizes[image]
        if not (0 < height <= MAX_SIZE and 0 < width <= MAX_SIZE):
            raise ValueError(f"image {image} is {height}x{width}; each side must be in 1..{MAX_SIZE}")
        changes = [] if scales is None else ["scaled"]
        horizontal, vertical = edges[::2], edges[1::2]
        if scales is not None:
            horizontal = [value * width / scales[0] for value in horizontal]
            vertical = [value * height / scales[1] for value in vertical]
            if not all(map(math.isfinite, (*horizontal, *vertical))):
                raise ValueError(f"box {number} is {tuple(box)}; at scale {scale} it is not finite")
        (left, right), (top, bottom) = (
            _interval(horizontal, width, changes),
            _interval(vertical, height, changes),
        )
        found.boxes.append((image, left, top, right, bottom))
        found.changes.append(tuple(sorted(set(changes), key=_ORDER.index)))
    return found


_ORDER = ("scaled", "swapped", "rounded", "clipped", "widened")


def _interval(edges: Sequence[float], size: int, changes: list[str]) -> tuple[int, int]:
    """Return the whole pixels [first, last) of 0…size that two edges enclose, at least one."""
    low, high = sorted(edges)
    if (low, high) != tuple(edges):
        changes.append("swapped")
    first, last = math.floor(low), math.ceil(high)
    if (first, last) != (low, high):
        changes.append("rounded")
    if first < 0 or last > size:
        changes.append("clipped")
    first, last = min(max(first, 0), size), min(max(last, 0), size)
    if first == last:
        changes.append("widened")
        first = min(first, size - 1)
        last = first + 1
    return first, last


def _scales(scale: Any) -> tuple[float, float] | None:
    if scale is None:
        return None
    pair = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    numbers: list[Any] = [value for value in pair if isinstance(value, Real) and not isinstance(value, bool)]
    if len(numbers) != 2 or len(pair) != 2:
        raise TypeError(f"scale is {scale!r:.80}; it must be a number, (width, height), or None for pixels")
    for value in numbers:
        if not 0 < value <= sys.float_info.max:
            raise ValueError(f"scale is {shown(value)}; it must be positive and finite")
    return float(numbers[0]), float(numbers[1])


def _numbers(number: int, box: Any) -> list[float]:
    if isinstance(box, UNORDERED):
        raise TypeError(f"box {number} is {shown(box)}, whose numbers have no order; give {FORM}")
    try:
        values = [None if isinstance(value, (str, bytes)) else float(value) for value in box]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"box {number} is {shown(box)}, not five numbers; give {FORM}") from None
    if len(values) != 5:
        raise ValueError(f"box {number} has {len(values)} numbers; give {FORM}")
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        raise TypeError(f"box {number} is {tuple(box)}; its numbers must be integers or floats, as in {FORM}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"box {number} is {tuple(box)}; its coordinates must be finite")
    return numbers
