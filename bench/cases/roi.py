"""roi_patch_embed and roi_patches against transformers' processor and torch's own antialiased resize."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, absent, peer, require_close, sweep, workspace
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
        # Smooth, so that an alternative that takes another tap here and there is still recognised as right.
        coarse = torch.from_numpy(np.random.default_rng(0).random((1, 3, 12, 16), dtype=np.float32))
        smooth = F.interpolate(coarse, (workload.height, workload.width), mode="bilinear")[0]
        pixels = np.ascontiguousarray((smooth * 255).byte().permute(1, 2, 0).numpy())
        self.workload, self.device, self.dtype = workload, device, getattr(torch, workload.dtype)
        self.size, self.array = (workload.height, workload.width), pixels
        self.image = torch.from_numpy(pixels).to(device)
        convolution = torch.randn(EMBED, 3, 2, PATCH, PATCH, device=device) / 34
        if self.dtype.is_floating_point:
            self.embed = fold_patch_weight(convolution, MEAN, STD, dtype=self.dtype)
            self.flat = convolution.reshape(EMBED, -1).to(self.dtype)
        limits = {"longest_edge": workload.longest_edge, "max_pixels": workload.max_pixels}
        self.policy = qwen2_vl_policy(**{name: value for name, value in limits.items() if value})
        self._fresh = count()

    def boxes(self) -> list[Box]:
        """`regions` boxes in a grid, moved by a few pixels from call to call if they are to be new."""
        i = next(self._fresh) if self.workload.new_geometry else 0
        width, height, n = self.workload.width, self.workload.height, self.workload.regions
        across = round(n**0.5)
        boxes = []
        for number in range(n):
            x, y = number % across, number // across
            left, right = width * x // across, width * (x + 1) // across
            top, bottom = height * y // across, height * (y + 1) // across
            boxes.append((0, left + i % 7, top + i % 3, right - i % 5, bottom - i % 11))
        return boxes

    def plan(self, boxes: list[Box]):
        return plan_regions([self.size], boxes, self.policy)

    def ours(self, boxes: list[Box] | None = None) -> Tensor:
        return roi_patch_embed([self.image], self.plan(boxes or self.boxes()), self.embed)

    def patches(self) -> Tensor:
        return roi_patches([self.image], self.plan(self.boxes()))

    def transformers(self) -> Callable[..., Tensor]:
        """Pillow's crop and NEAREST step, transformers' Pillow processor, one GEMM: its pixels are equal to ours."""
        from PIL import Image
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        limit = self.workload.max_pixels or 12_845_056
        processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=limit)
        picture = Image.fromarray(self.array)

        def call(boxes: list[Box] | None = None) -> Tensor:
            crops = [picture.crop(box[1:]) for box in boxes or self.boxes()]
            longest = self.workload.longest_edge
            for number, crop in enumerate(crops if longest else ()):
                if max(crop.size) > longest:
                    size = [int(side * (longest / max(crop.size))) for side in crop.size]
                    crops[number] = crop.resize(size, Image.Resampling.NEAREST)
            values = processor(images=crops, return_tensors="pt")["pixel_values"]
            return F.linear(values.to(self.device, self.dtype), self.flat)

        return call

    def resized(
        self, boxes: list[Box] | None = None, resize: Callable[[Tensor, tuple[int, int]], Tensor] = _interpolate
    ) -> list[tuple[Tensor, int, int]]:
        """torch's uint8 resize on the CPU, float32 on a GPU, of what remains after the NEAREST step; not bit-exact."""
        boxes, longest = boxes or self.boxes(), self.workload.longest_edge
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
        boxes: list[Box] | None = None,
        linear: Callable[..., Tensor] = F.linear,
        resize: Callable[[Tensor, tuple[int, int]], Tensor] = _interpolate,
    ) -> Tensor:
        matrices = []
        for pixels, rows, columns in self.resized(boxes, resize):
            blocks = pixels.reshape(3, rows // 2, 2, PATCH, columns // 2, 2, PATCH).permute(1, 4, 2, 5, 3, 6, 0)
            matrices.append((blocks.reshape(rows * columns, -1).to(self.dtype) - 128) / 256)
        return linear(torch.cat(matrices), self.embed.weight).add_(self.embed.bias[0, -1].to(self.dtype))

    def torchvision(self) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode, functional

        def resize(crop: Tensor, size: tuple[int, int]) -> Tensor:
            return functional.resize(crop, list(size), InterpolationMode.BICUBIC, antialias=True)

        return self.interpolate(resize=resize)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def build(workload: Roi, device: str) -> Case:
    problem = Problem(workload, device)
    boxes = problem.boxes()
    rows = problem.plan(boxes).rows
    operand = torch.randn(rows, 3 * PATCH * PATCH, device=device).to(problem.dtype)
    missing = absent("transformers")
    transformers = None if missing else problem.transformers()
    alternatives: dict[str, list[Call] | str] = {
        "transformers' Pillow processor + F.linear": missing or [transformers],
        "F.interpolate, not exact, + F.linear": [problem.interpolate],
        "GEMM alone": [lambda: F.linear(operand, problem.embed.weight)],
    }
    name = "torchvision's resize, not exact, + F.linear"
    alternatives[name] = peer("torchvision", lambda one: one.torchvision, [problem])
    if workload.dtype == "float32" and device == "cpu" and torch.backends.mkldnn.is_available():
        # F.linear takes MKL for float32; oneDNN is faster on some processors, and less exact.
        alternatives["F.interpolate, not exact, + oneDNN"] = [lambda: problem.interpolate(linear=_onednn)]
        alternatives["GEMM alone, oneDNN"] = [lambda: _onednn(operand, problem.embed.weight)]
    alternatives["torch.compile"] = "compiles anew for every size of a region"
    if not workload.new_geometry:
        compiled = torch.compile(problem.interpolate)
        alternatives["torch.compile"] = [lambda: compiled(boxes)]

    def check() -> None:
        ours = problem.ours(boxes)
        if transformers:
            exact = 1e-4 if workload.dtype == "float32" else 2e-2
            require_close("roi_patch_embed against transformers", ours, transformers(boxes), exact)
        # Not exact: pixels differ by a level here and there, and on large reductions in the choice of taps.
        require_close("F.interpolate", problem.interpolate(boxes), ours, 3e-2)

    crop_bytes = sum(3 * (right - left) * (bottom - top) for _, left, top, right, bottom in boxes)
    work = roi_work(crop_bytes, rows, 3 * PATCH * PATCH, EMBED, workload.dtype)
    outputs = rows * EMBED * problem.dtype.itemsize
    return Case(
        "roi_patch_embed",
        workload.shape + ("" if workload.new_geometry else ", same boxes"),
        workload.dtype,
        device,
        [problem.ours],
        alternatives,
        check,
        work,
        workspace(problem.ours, device, outputs),
        sweep=sweep("roi_patch_embed", workload),
    )


def build_patches(workload: Roi, device: str) -> Case:
    """The resampling alone, without embedding."""
    problem = Problem(workload, device)
    boxes = problem.boxes()
    plan = problem.plan(boxes)

    def check() -> None:
        ours = roi_patches([problem.image], plan)
        require_close("roi_patches", ours, roi_patches([problem.image], plan, backend="reference"), 0.0)

    crop_bytes = sum(3 * (right - left) * (bottom - top) for _, left, top, right, bottom in boxes)
    return Case(
        "roi_patches",
        workload.shape,
        "uint8",
        device,
        [problem.patches],
        {"F.interpolate, not exact": [problem.resized]},
        check,
        patches_work(crop_bytes, plan.rows, plan.row_bytes),
        workspace(problem.patches, device, plan.rows * plan.row_bytes),
    )
