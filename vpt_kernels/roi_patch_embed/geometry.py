"""Host-side planning: from image sizes and boxes to one integer table that every backend reads.

Planning happens once per look and is on the clock, so it is plain integer arithmetic: resampling coefficients are
computed by the backend from the table's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import index
from typing import Any

import torch
from torch import Tensor

from vpt_kernels.checks import require_choice, require_integer, shown

MAX_SIZE = 1 << 20
"""Largest width or height, in pixels, of an image or of a resampled region."""
MAX_ASPECT_RATIO = 200
PIXEL_ZERO, PIXEL_SCALE = 128, 256
"""The GEMM reads (pixel − 128)/256: exact in every dtype, near the centre of the pixels, which keeps the folded bias
small, and of order one, which keeps float16 weights normal. Padded pixels are stored as 128 and contribute nothing."""


def padded_columns(columns: int) -> int:
    """Return the columns of a folded weight as the kernels read it, a multiple of 16: 592 of 588, with zeros behind."""
    return -(-columns // 16) * 16


class Column(IntEnum):
    """Columns of `RegionPlan.table` (int32, one row per region); the C++ reader is `csrc/math/plan.h`."""

    IMAGE = 0
    IMAGE_WIDTH = 1
    IMAGE_HEIGHT = 2
    LEFT = 3
    TOP = 4
    WIDTH = 5
    HEIGHT = 6
    # Up to three NEAREST steps, as (width, height); a step that is not taken repeats the size before it.
    NEAREST_WIDTH_1 = 7
    NEAREST_HEIGHT_1 = 8
    NEAREST_WIDTH_2 = 9
    NEAREST_HEIGHT_2 = 10
    NEAREST_WIDTH_3 = 11
    NEAREST_HEIGHT_3 = 12
    RESIZED_WIDTH = 13
    RESIZED_HEIGHT = 14
    FILTER = 15
    VERTICAL_FIRST = 16
    WINDOW_LEFT = 17
    WINDOW_TOP = 18
    GRID_WIDTH = 19
    GRID_HEIGHT = 20
    PATCH_SIZE = 21
    MERGE_SIZE = 22
    FIRST_ROW = 23
    COUNT = 24


FILTERS = ("bicubic", "bilinear")
PASS_ORDERS = ("hv", "installed")


@dataclass(frozen=True)
class RegionPolicy:
    """How a crop becomes patches. All sizes are (height, width) in pixels.

    Args:
        fit: the resized size of a crop of the given size.
        patch_size: side of a square patch, p.
        merge_size: patches of an m×m block are adjacent in the output, in order (h/m, w/m, m, m); 1 = row-major.
        resample: "bicubic" (a = −0.5) or "bilinear", both with Pillow's antialiasing.
        pass_order: "hv" resamples rows first, as Pillow ≤ 12.0 does; "installed" follows the installed Pillow.
        regularize_edge: if set, the crop first goes through LLaMA-Factory's NEAREST steps: longest edge at most this,
            then both edges at least 28, then an aspect ratio of at most 200.
        window: if set, the size of the canvas that is cut into patches; default: the resized size.
        anchor: "center" takes the window from the middle of the resized image (which must contain it);
            "top_left" puts the image into the window's corner and pads at the right or at the bottom with
            zeros of the normalised space.
    """

    fit: Callable[[int, int], tuple[int, int]]
    patch_size: int = 14
    merge_size: int = 1
    resample: str = "bicubic"
    pass_order: str = "hv"
    regularize_edge: int | None = None
    window: tuple[int, int] | None = None
    anchor: str = "top_left"

    def __post_init__(self) -> None:
        if not callable(self.fit):
            raise TypeError(f"fit is {shown(self.fit)}; it must be a function (height, width) -> (height, width)")
        for name in ("patch_size", "merge_size"):
            object.__setattr__(self, name, require_integer(name, getattr(self, name), 1, MAX_SIZE))
        require_choice("resample", self.resample, FILTERS)
        require_choice("pass_order", self.pass_order, PASS_ORDERS)
        require_choice("anchor", self.anchor, ("center", "top_left"))
        if self.regularize_edge is not None:
            edge = require_integer("the longest edge (regularize_edge)", self.regularize_edge, 1, MAX_SIZE)
            object.__setattr__(self, "regularize_edge", edge)
        if self.window is not None:
            height, width = _pair("window", self.window)
            require_integer("the window's height", height, 1, MAX_SIZE)
            require_integer("the window's width", width, 1, MAX_SIZE)


@dataclass(frozen=True)
class SmartResize:
    """The size that Qwen2-VL resizes to: multiples of `factor` with between `min_pixels` and `max_pixels` pixels.

    Raises ValueError where the limits are not in this order, and for an aspect ratio above 200 when called.
    """

    factor: int
    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            object.__setattr__(self, name, require_integer(name, getattr(self, name), -math.inf))
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels {shown(self.min_pixels)} and max_pixels {shown(self.max_pixels)} must be positive and in "
                "this order"
            )

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        factor, min_pixels, max_pixels = self.factor, self.min_pixels, self.max_pixels
        ratio = max(height, width) / min(height, width)
        if ratio > MAX_ASPECT_RATIO:
            raise ValueError(
                f"aspect ratio of the {height}x{width} (height x width) region is {ratio:.1f}; the limit is "
                f"{MAX_ASPECT_RATIO}. Widen the box, or set longest_edge to regularise it"
            )
        # round() is Python's half-to-even, as in transformers.
        out_h, out_w = round(height / factor) * factor, round(width / factor) * factor
        if out_h * out_w > max_pixels:
            beta = math.sqrt(height * width / max_pixels)
            out_h = max(factor, math.floor(height / beta / factor) * factor)
            out_w = max(factor, math.floor(width / beta / factor) * factor)
        elif out_h * out_w < min_pixels:
            beta = math.sqrt(min_pixels / (height * width))
            out_h = math.ceil(height * beta / factor) * factor
            out_w = math.ceil(width * beta / factor) * factor
        return out_h, out_w


@dataclass(frozen=True)
class ShortestEdge:
    """The size whose shortest edge is `edge`, the other truncated, as DINOv2's processor has it."""

    edge: int

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        if height <= width:
            return self.edge, int(self.edge * width / height)
        return int(self.edge * height / width), self.edge


@dataclass(frozen=True)
class LongestEdge:
    """The size whose longest edge is `edge`, the other rounded, as SAM's processor has it."""

    edge: int

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        scale = self.edge / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def qwen2_vl_policy(
    min_pixels: int = 56 * 56,
    max_pixels: int = 12_845_056,
    *,
    longest_edge: int | None = None,
    patch_size: int = 14,
    merge_size: int = 2,
    pass_order: str = "hv",
) -> RegionPolicy:
    """Return Qwen2-VL's preprocessing; other members of the family differ in `patch_size`, `merge_size` and the limits.

    `longest_edge` adds the NEAREST regularisation that VPT's training and evaluation applied first (they use 512).
    Source: `smart_resize` of transformers' Qwen2-VL image processor; LLaMA-Factory 0.9.1 `_preprocess_image`.
    """
    patch_size = require_integer("patch_size", patch_size, 1, MAX_SIZE)
    merge_size = require_integer("merge_size", merge_size, 1, MAX_SIZE)
    fit = SmartResize(patch_size * merge_size, min_pixels, max_pixels)
    return RegionPolicy(fit, patch_size, merge_size, "bicubic", pass_order, longest_edge)


def dinov2_policy(
    *, shortest_edge: int = 256, crop: int = 224, longest_edge: int | None = None, pass_order: str = "hv"
) -> RegionPolicy:
    """Return DINOv2's preprocessing: shortest edge to 256 (BICUBIC), then the central 224×224.

    Source: transformers' BitImageProcessor with the configuration of facebook/dinov2-base.
    """
    fit = ShortestEdge(require_integer("shortest_edge", shortest_edge, 1, MAX_SIZE))
    return RegionPolicy(fit, 14, 1, "bicubic", pass_order, longest_edge, (crop, crop), "center")


def sam_policy(*, edge: int = 1024, longest_edge: int | None = None, pass_order: str = "hv") -> RegionPolicy:
    """Return SAM's preprocessing: longest edge to 1024 (BILINEAR), zero padding at the right or at the bottom.

    Source: transformers' SamImageProcessor with the configuration of facebook/sam-vit-large.
    """
    fit = LongestEdge(require_integer("edge", edge, 1, MAX_SIZE))
    return RegionPolicy(fit, 16, 1, "bilinear", pass_order, longest_edge, (edge, edge), "top_left")


@dataclass(frozen=True)
class RegionPlan:
    """Where every patch of every region comes from.

    Attributes:
        table: int32 CPU tensor [regions, Column.COUNT].
        rows: patches of all regions, Σ grid_h·grid_w.
        grids: (grid_h, grid_w) in patches, one per region; `image_grid_thw` is (1, grid_h, grid_w).
        offsets: first patch row of each region, and `rows` at the end.
        sizes: (height, width) of the images the plan was made for.
        patch_size: p; a patch is p·p·3 bytes in (y, x, channel) order.
    """

    table: Tensor
    rows: int
    grids: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    patch_size: int

    @property
    def row_bytes(self) -> int:
        return 3 * self.patch_size * self.patch_size


def _nearest_steps(height: int, width: int, edge: int | None) -> tuple[int, ...]:
    """Return the sizes (w, h, w, h, w, h) after each of LLaMA-Factory's NEAREST steps, in its own arithmetic."""
    if edge is None:
        return (width, height) * 3
    if max(width, height) > edge:
        factor = edge / max(width, height)
        width, height = int(width * factor), int(height * factor)
    first = (width, height)
    # A very elongated crop can reach zero here; LLaMA-Factory fails on it, one pixel is what it meant.
    width, height = max(width, 1), max(height, 1)
    if min(width, height) < 28:
        width, height = max(width, 28), max(height, 28)
    second = (width, height)
    if width / height > MAX_ASPECT_RATIO:
        width = height * 180
    elif height / width > MAX_ASPECT_RATIO:
        height = width * 180
    return (max(first[0], 1), max(first[1], 1), *second, width, height)


def _vertical_first(policy: RegionPolicy, in_h: int, in_w: int, out_h: int, out_w: int) -> bool:
    if policy.pass_order == "hv":
        return False
    import PIL

    version = tuple(int(part) for part in PIL.__version__.split(".")[:2])
    if version >= (13, 0):
        return out_h < in_h and in_h - out_h > 2 * (in_w - out_w)
    return version >= (12, 2) and in_h > 100 * in_w and out_h < in_h


def plan_regions(sizes: Sequence[tuple[int, int]], boxes: Sequence[Sequence[int]], policy: RegionPolicy) -> RegionPlan:
    """Plan the patches of `boxes`, each cropped first and then resized on its own.

    Args:
        sizes: (height, width) of each image, in pixels.
        boxes: (image, left, top, right, bottom) per region: index into `sizes`, then integer pixels, right and
            bottom exclusive.
        policy: see `RegionPolicy`, `qwen2_vl_policy`, `dinov2_policy`, `sam_policy`.

    Returns:
        RegionPlan; regions keep the order of `boxes`.

    Raises:
        ValueError: a box is empty or leaves its image, the index is unknown, a resized size is not a multiple of
            patch_size × merge_size, or a window does not fit.
        TypeError: a box is not a sequence (one box instead of a list of them), or a coordinate not an integer.
    """
    if not isinstance(policy, RegionPolicy):
        raise TypeError(f"policy is {shown(policy)}; it must be a RegionPolicy, such as qwen2_vl_policy()")
    sizes, boxes = image_sizes(sizes), listed_boxes(boxes)
    block = policy.patch_size * policy.merge_size
    filter_id = FILTERS.index(policy.resample)
    table: list[list[int]] = []
    grids: list[tuple[int, int]] = []
    offsets = [0]
    for number, box in enumerate(boxes):
        image, left, top, right, bottom = _numbers(number, box)
        if not 0 <= image < len(sizes):
            raise ValueError(f"box {number} names image {image}; there are {len(sizes)} images")
        image_h, image_w = sizes[image]
        if not 0 < max(image_h, image_w) <= MAX_SIZE or min(image_h, image_w) < 1:
            raise ValueError(f"image {image} is {image_h}x{image_w}; each side must be in 1..{MAX_SIZE}")
        if not (0 <= left < right <= image_w and 0 <= top < bottom <= image_h):
            raise ValueError(
                f"box {number} ({left}, {top}, {right}, {bottom}) is empty or leaves image {image} "
                f"(width {image_w}, height {image_h}); clip it to the image first"
            )
        width, height = right - left, bottom - top
        steps = _nearest_steps(height, width, policy.regularize_edge)
        in_w, in_h = steps[-2:]
        out_h, out_w = _pair("the size that fit returns", policy.fit(in_h, in_w))
        if not (0 < out_h <= MAX_SIZE and 0 < out_w <= MAX_SIZE):
            raise ValueError(f"box {number} resizes to {out_h}x{out_w}; each side must be in 1..{MAX_SIZE}")
        window_h, window_w = policy.window or (out_h, out_w)
        if window_h % block or window_w % block:
            raise ValueError(
                f"box {number} is cut from {window_h}x{window_w} (height x width) pixels; both must be multiples of "
                f"patch_size x merge_size = {policy.patch_size} x {policy.merge_size}"
            )
        window_top = window_left = 0
        if policy.anchor == "center":
            if out_h < window_h or out_w < window_w:
                raise ValueError(
                    f"box {number} resizes to {out_h}x{out_w}, smaller than its {window_h}x{window_w} window; "
                    "a centred window must lie inside (use anchor='top_left' to pad)"
                )
            window_top, window_left = (out_h - window_h) // 2, (out_w - window_w) // 2
        elif out_h < window_h and out_w < window_w:
            raise ValueError(
                f"box {number} resizes to {out_h}x{out_w} in a {window_h}x{window_w} window; padding is supported "
                "at the right or at the bottom, not both: let `fit` fill one axis"
            )
        grid_h, grid_w = window_h // policy.patch_size, window_w // policy.patch_size
        table.append(
            [image, image_w, image_h, left, top, width, height, *steps, out_w, out_h, filter_id]
            + [int(_vertical_first(policy, in_h, in_w, out_h, out_w)), window_left, window_top, grid_w, grid_h]
            + [policy.patch_size, policy.merge_size, offsets[-1]]
        )
        grids.append((grid_h, grid_w))
        offsets.append(offsets[-1] + grid_h * grid_w)
    if offsets[-1] >= 1 << 31:
        raise ValueError(f"the plan has {offsets[-1]} patches; the limit is 2^31 - 1: split the boxes over calls")
    rows = torch.tensor(table, dtype=torch.int32, device="cpu").reshape(len(table), Column.COUNT)
    return RegionPlan(rows, offsets[-1], tuple(grids), tuple(offsets), sizes, policy.patch_size)


def _pair(name: str, value: Any) -> tuple[int, int]:
    try:
        first, second = value
        return index(first), index(second)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {shown(value)}; it must be two integers (height, width)") from None


def image_sizes(sizes: Any) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of each image. Raises TypeError for anything but pairs of integers."""
    try:
        listed = list(sizes)
    except (TypeError, RuntimeError):
        raise TypeError(f"sizes is {shown(sizes)}; give a list of (height, width), one per image") from None
    return tuple([_pair(f"the size of image {number}", size) for number, size in enumerate(listed)])


def listed_boxes(boxes: Any) -> Sequence[Any]:
    """Return boxes that can be gone through, a tensor's read at once. Raises TypeError where there is no list of
    boxes.
    """
    try:
        if getattr(boxes, "ndim", 2) not in (1, 2):
            raise TypeError
        return boxes.tolist() if isinstance(boxes, Tensor) and boxes.dim() == 2 else list(boxes)
    except (TypeError, RuntimeError):  # what holds no numbers here, or cannot be gone through
        raise TypeError(f"boxes is {shown(boxes)}; give a list of boxes (image, left, top, right, bottom)") from None


UNORDERED = (set, frozenset, dict)
"""What holds five numbers without saying which is which."""


def _numbers(number: int, box: Any) -> tuple[int, ...]:
    """Return the five integers of a box. Whole floats, as models print them and arrays hold them, are integers too."""
    if isinstance(box, UNORDERED):
        raise TypeError(f"box {number} is {shown(box)}, whose numbers have no order; give a list of five numbers")
    try:
        numbers = len(box)
    except (TypeError, RuntimeError):
        found = shown(box) if isinstance(box, int) else f"{box!r:.80}"
        raise TypeError(
            f"box {number} is {found}, not five numbers; give a list of boxes (image, left, top, right, bottom)"
        ) from None
    if numbers != 5:
        raise ValueError(f"box {number} has {numbers} numbers; give (image, left, top, right, bottom)")
    try:
        return tuple(map(index, box))
    except TypeError:
        pass
    try:
        return tuple([_whole(value) for value in box])
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"box {number} is {tuple(box)}; coordinates must be integers (pixels), see clip_boxes"
        ) from None


def _whole(value: Any) -> int:
    if isinstance(value, str):
        raise TypeError
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)
