"""What every call of `roi_patch_embed` must fulfil, and its composition in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers import (
    assert_twice_as_good,
    linear,
    normal,
    patchify,
)
from vpt_kernels import (
    RegionPlan,
    RegionPolicy,
    fold_patch_weight,
    plan_regions,
    roi_patch_embed,
    roi_patches,
)


def unfused(
    pixels: Tensor, valid: Tensor, weight: Tensor, bias: Tensor | None, mean, std, dtype: torch.dtype
) -> Tensor:
    """Normalise in float32 (in float64 when that is asked for), pad with zeros, cast, one linear layer."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    patch = weight.shape[-1]
    x = (pixels.view(-1, patch, patch, 3).to(wide) / 255 - torch.tensor(mean, dtype=wide)) / torch.tensor(
        std, dtype=wide
    )
    x = torch.where(valid.view(-1, patch, patch, 1), x, 0).permute(0, 3, 1, 2)
    frames = weight.shape[2] if weight.dim() == 5 else 1
    x = x[:, :, None].expand(-1, -1, frames, -1, -1).reshape(len(x), -1)
    return linear(x.to(dtype), weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype))


def valid_pixels(policy: RegionPolicy, plan: RegionPlan, boxes: list[tuple[int, ...]]) -> Tensor:
    """bool [rows, p·p]: which pixels are image, not padding."""
    rows = []
    for grid, (_, left, top, right, bottom) in zip(plan.grids, boxes, strict=True):
        height, width = policy.fit(bottom - top, right - left)
        canvas = torch.zeros(grid[0] * policy.patch_size, grid[1] * policy.patch_size, 1, dtype=torch.bool)
        canvas[:height, :width] = True
        rows.append(patchify(canvas, policy.patch_size, policy.merge_size))
    return torch.cat(rows)


def weights(shape: tuple[int, ...], dtype: torch.dtype, coherent: bool = False) -> Tensor:
    """Random; coherent ones have a common sign, so that errors of a flat image add up."""
    return (normal(*shape, key="patch weight", scale=0.02) + (0.03 if coherent else 0)).to(dtype)


def check(images, boxes, policy, weight, bias, mean, std, dtype, backend, what):
    plan = plan_regions([tuple(image.shape[:2]) for image in images], boxes, policy)
    actual = roi_patch_embed(images, plan, fold_patch_weight(weight, mean, std, bias), backend=backend)
    pixels = roi_patches(images, plan, backend="reference")
    valid = valid_pixels(policy, plan, boxes)
    oracle = unfused(pixels, valid, weight, bias, mean, std, torch.float64)
    eager = unfused(pixels, valid, weight, bias, mean, std, dtype)
    assert_twice_as_good(actual, eager, oracle, what)
