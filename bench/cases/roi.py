"""roi_patch_embed and roi_patches against transformers' processor and torch's own antialiased resize."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    COMPILED,
    TOLERANCES,
    Alternative,
    Case,
    absent,
    has_onednn,
    onednn,
    require_close,
    smooth_pixels,
    sweep,
    workspace,
)
from bench.rooflines import patches_work, roi_work
from bench.timers import Call
from bench.workloads import Roi
from vpt_kernels import fold_patch_weight, plan_regions, qwen2_vl_policy, roi_patch_embed, roi_patches

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EMBED, PATCH = 1280, 14
Box = tuple[int, int, int, int, int]


def _interpolate(crop: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(crop, size, mode="bicubic", antialias=True)


class Problem:
    """One image, its boxes, and every implementation of the same tokens."""

    def __init__(self, workload: Roi, device: str) -> None:
        torch.manual_seed(0)
        pixels = smooth_pixels(workload.height, workload.width)
        self.workload, self.device, self.dtype = workload, device, getattr(torch, workload.dtype)
        self.size, self.array = (workload.height, workload.width), pixels
        self.image = torch.from_numpy(pixels).to(device)
        convolution = torch.randn(EMBED, 3, 2, PATCH, PATCH, device=device) / 34
        if self.dtype.is_floating_point:
            self.embed = fold_patch_weight(convolution, MEAN, STD, dtype=self.dtype)
            self.flat = convolution.reshape(EMBED, -1).to(self.dtype)
            self.raw, self.raw_bias = _folded(convolution, self.dtype)
        limits = {"longest_edge": workload.longest_edge, "max_pixels": workload.max_pixels}
        self.policy = qwen2_vl_policy(**{name: value for name, value in limits.items() if value})

    def boxes(self, turn: int = 0) -> list[Box]:
        """Return `regions` boxes in a grid, moved by a few pixels from turn to turn if they are to be new."""
        i = turn if self.workload.new_geometry else 0
        width, height, n = self.workload.width, self.workload.height, self.workload.regions
        across = round(n**0.5)
        boxes = []
        for number in range(n):
            x, y = number % across, number // across
            left, right = width * x // across, width * (x + 1) // across
            top, bottom = height * y // across, height * (y + 1) // across
            boxes.append((0, left + i % 7, top + i % 3, right - i % 5, bottom - i % 11))
        return boxes

    def in_turn(self, call: Callable[[list[Box]], object]) -> Call:
        """`call` on new boxes each time; every call made by this method sees the same ones in the same turn."""
        turn = count()
        return lambda: call(self.boxes(next(turn)))

    def plan(self, boxes: list[Box]):
        return plan_regions([self.size], boxes, self.policy)

    def crop_bytes(self, boxes: list[Box]) -> int:
        """Return the bytes of the image that the boxes' results depend on: whole lines, of those that the NEAREST step
        takes.
        """
        longest, read = self.workload.longest_edge, 0
        for _, left, top, right, bottom in boxes:
            width, height = right - left, bottom - top
            reduction = min(1.0, longest / max(width, height)) if longest else 1.0
            read += 3 * width * int(height * reduction)
        return read

    def ours(self, boxes: list[Box]) -> Tensor:
        return roi_patch_embed([self.image], self.plan(boxes), self.embed)

    def patches(self, boxes: list[Box]) -> Tensor:
        return roi_patches([self.image], self.plan(boxes))

    def transformers(self) -> Callable[[list[Box]], Tensor]:
        """Run Pillow's crop and NEAREST step, transformers' Pillow processor and one GEMM: the pixels equal ours."""
        from PIL import Image
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        limit = self.workload.max_pixels or 12_845_056
        processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=limit)
        picture = Image.fromarray(self.array)

        def call(boxes: list[Box]) -> Tensor:
            crops = [picture.crop(box[1:]) for box in boxes]
            longest = self.workload.longest_edge
            for number, crop in enumerate(crops if longest else ()):
                if max(crop.size) > longest:
                    size = [int(side * (longest / max(crop.size))) for side in crop.size]
                    crops[number] = crop.resize(size, Image.Resampling.NEAREST)
            values = processor(images=crops, return_tensors="pt")["pixel_values"]
            return F.linear(values.to(self.device, self.dtype), self.flat)

        return call

    def resized(
        self, boxes: list[Box], resize: Callable[[Tensor, tuple[int, int]], Tensor] = _interpolate
    ) -> list[tuple[Tensor, int, int]]:
        """Return torch's uint8 resize (float32 on a GPU) of what remains after the NEAREST step; not bit-exact."""
        longest = self.workload.longest_edge
        result = []
        for (rows, columns), (_, left, top, right, bottom) in zip(self.plan(boxes).grids, boxes):
            crop = self.image[top:bottom, left:right].permute(2, 0, 1)[None]
            if longest and max(crop.shape[-2:]) > longest:
                scale = longest / max(crop.shape[-2:])
                crop = F.interpolate(crop, [int(side * scale) for side in crop.shape[-2:]], mode="nearest-exact")
            crop = crop if self.device == "cpu" else crop.float()
            result.append((resize(crop, (rows * PATCH, columns * PATCH))[0], rows, columns))
        return result

    def interpolate(
        self,
        boxes: list[Box],
        linear: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear,
        resize: Callable[[Tensor, tuple[int, int]], Tensor] = _interpolate,
    ) -> Tensor:
        """Return the pixels as they are: scale and offset are in the weight and the bias."""
        matrices = []
        for pixels, rows, columns in self.resized(boxes, resize):
            blocks = pixels.reshape(3, rows // 2, 2, PATCH, columns // 2, 2, PATCH).permute(1, 4, 2, 5, 3, 6, 0)
            matrices.append(blocks.reshape(rows * columns, -1))
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        return linear(matrix.to(self.dtype), self.raw, self.raw_bias)

    def torchvision(self, boxes: list[Box]) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode, functional

        def resize(crop: Tensor, size: tuple[int, int]) -> Tensor:
            return functional.resize(crop, list(size), InterpolationMode.BICUBIC, antialias=True)

        return self.interpolate(boxes, resize=resize)

    def transformers_fast(self) -> Callable[[list[Box]], Tensor]:
        """Run transformers' processor on torchvision, which crops and resizes on the device; not bit-exact."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=self.workload.max_pixels)
        planes = self.image.permute(2, 0, 1)

        def call(boxes: list[Box]) -> Tensor:
            crops = [planes[:, top:bottom, left:right] for _, left, top, right, bottom in boxes]
            values = processor(images=crops, return_tensors="pt", device=self.device)["pixel_values"]
            return F.linear(values.to(self.dtype), self.flat)

        return call


def _folded(convolution: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weight [embed, pixels of a patch in the order y, x, channel] and bias for pixels of 0 … 255."""
    weight = convolution.double().sum(2)
    mean, std = (
        torch.tensor(values, dtype=torch.double, device=weight.device)[:, None, None] for values in (MEAN, STD)
    )
    scaled = weight / (255 * std)
    bias = -(weight * mean / std).sum((1, 2, 3))
    return scaled.permute(0, 2, 3, 1).flatten(1).to(dtype).contiguous(), bias.to(dtype)


def _operand(problem: Problem) -> Tensor:
    """Return a patch matrix of the row's size, of whatever values."""
    rows = problem.plan(problem.boxes()).rows
    return torch.randn(rows, 3 * PATCH * PATCH, device=problem.device).to(problem.dtype)


def _gemm(problem: Problem) -> Callable[[list[Box]], Tensor]:
    operand = _operand(problem)
    return lambda boxes: F.linear(operand, problem.raw)


def _onednn_gemm(problem: Problem) -> Callable[[list[Box]], Tensor]:
    operand = _operand(problem)
    return lambda boxes: onednn(operand, problem.raw)


def _same_boxes(problem: Problem) -> str | None:
    return "compiles anew for every size of a region" if problem.workload.new_geometry else None


def _limited_by_area(problem: Problem) -> str | None:
    return None if problem.workload.max_pixels else "knows no longest edge"


PROCESSOR = Alternative(
    "transformers' Pillow processor + F.linear",
    "PIL crop and NEAREST step, Qwen2VLImageProcessorPil, one F.linear over its patches; the same pixels as ours",
    lambda problem: problem.transformers(),
    lambda problem: absent("transformers"),
)
INTERPOLATE = Alternative(
    "F.interpolate, not exact, + F.linear",
    "slices of the uint8 image, torch's antialiased bicubic resize (uint8 on a CPU, float32 on a GPU), one gather "
    "into patches, one F.linear with normalisation folded into weight and bias; sizes from our plan",
    lambda problem: problem.interpolate,
    exact=False,
)
EMBEDDERS = (
    PROCESSOR,
    INTERPOLATE,
    Alternative(
        "F.interpolate, not exact, + oneDNN",
        "the same with mkldnn._linear_pointwise instead of MKL's product",
        lambda problem: lambda boxes: problem.interpolate(boxes, onednn),
        has_onednn,
        exact=False,
    ),
    Alternative(
        "torchvision's resize, not exact, + F.linear",
        "as F.interpolate, by torchvision.transforms.v2.functional.resize",
        lambda problem: problem.torchvision,
        exact=False,
        peer="torchvision",
    ),
    Alternative(
        "transformers' torchvision processor, not exact, + F.linear",
        "Qwen2VLImageProcessor on the row's device, F.linear",
        lambda problem: problem.transformers_fast(),
        _limited_by_area,
        exact=False,
        peer="torchvision",
    ),
    Alternative(
        "torch.compile", COMPILED, lambda problem: torch.compile(problem.interpolate), _same_boxes, exact=False
    ),
)
BOUNDS = (
    Alternative("GEMM alone", "F.linear over a patch matrix that is already there", _gemm),
    Alternative("GEMM alone, oneDNN", "the same with mkldnn._linear_pointwise", _onednn_gemm, has_onednn),
)
RESIZE = Alternative(
    "F.interpolate, not exact",
    "torch's antialiased bicubic resize of the uint8 image, to planes, not into patches",
    lambda problem: problem.resized,
    exact=False,
)
ALTERNATIVES = (*EMBEDDERS, *BOUNDS, RESIZE)


def build(workload: Roi, device: str) -> Case:
    problem = Problem(workload, device)
    boxes = problem.boxes()
    rows = problem.plan(boxes).rows
    others = {one: one.calls([problem], boxes) for one in EMBEDDERS}
    bounds = {one: one.calls([problem]) for one in BOUNDS}

    def check() -> None:
        reference = others[PROCESSOR]
        if isinstance(reference, str):
            expected = roi_patch_embed([problem.image], problem.plan(boxes), problem.embed, backend="reference")
        else:
            expected = reference[0](boxes)
        tolerance = TOLERANCES[workload.dtype]
        require_close("roi_patch_embed: ours", problem.ours(boxes), expected, tolerance)
        for one, calls in others.items():
            # What is not exact takes another level here and there, and on large reductions other taps.
            if not isinstance(calls, str):
                limit = tolerance if one.exact else 3e-2
                require_close(f"roi_patch_embed: {one.name}", calls[0](boxes), expected, limit)

    def timed(calls: list | str) -> list[Call] | str:
        return calls if isinstance(calls, str) else [problem.in_turn(calls[0])]

    return Case(
        "roi_patch_embed",
        workload.shape,
        workload.dtype,
        device,
        [problem.in_turn(problem.ours)],
        {one.name: timed(calls) for one, calls in (others | bounds).items()},
        check,
        roi_work(problem.crop_bytes(boxes), rows, 3 * PATCH * PATCH, EMBED, workload.dtype),
        workspace(lambda: problem.ours(boxes), device, rows * EMBED * problem.dtype.itemsize),
        sweep=sweep("roi_patch_embed", workload),
        capture=not workload.new_geometry,
    )


def build_patches(workload: Roi, device: str) -> Case:
    """Return the resampling alone, without embedding."""
    problem = Problem(workload, device)
    boxes = problem.boxes()
    plan = problem.plan(boxes)
    side = 3 * PATCH * PATCH

    def check() -> None:
        expected = roi_patches([problem.image], plan, backend="reference")
        require_close("roi_patches", problem.patches(boxes), expected, 0.0)
        resized = [pixels.flatten() for pixels, _, _ in problem.resized(boxes)]
        images = expected.reshape(-1, side).split([rows * columns for rows, columns in plan.grids])
        for pixels, patches, (rows, columns) in zip(resized, images, plan.grids):
            grid = patches.reshape(rows // 2, columns // 2, 2, 2, PATCH, PATCH, 3).permute(6, 0, 2, 4, 1, 3, 5)
            require_close("F.interpolate", pixels, grid.flatten(), 3e-2)

    return Case(
        "roi_patches",
        workload.shape,
        "uint8",
        device,
        [problem.in_turn(problem.patches)],
        {RESIZE.name: [problem.in_turn(call) for call in RESIZE.calls([problem])]},
        check,
        patches_work(problem.crop_bytes(boxes), plan.rows, plan.row_bytes),
        workspace(lambda: problem.patches(boxes), device, plan.rows * plan.row_bytes),
        capture=False,
    )
