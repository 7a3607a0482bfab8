"""A region whose vertical pass comes first, whatever the installed Pillow does: two one-axis resizes in that order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers import assert_same_bits, each_backend, noise, numbers, patchify
from vpt_kernels import RegionPlan, dinov2_policy, plan_regions, qwen2_vl_policy, roi_patches, sam_policy
from vpt_kernels.roi_patch_embed.geometry import Column

POLICIES = {"qwen2_vl": qwen2_vl_policy(), "dinov2": dinov2_policy(), "sam": sam_policy(edge=256)}


def ordered(plan: RegionPlan, vertical_first: bool) -> RegionPlan:
    table = plan.table.clone()
    table[:, Column.VERTICAL_FIRST] = int(vertical_first)
    return replace(plan, table=table)


def resized(image: Tensor, row: list[int], vertical_first: bool) -> Tensor:
    """The resized crop, one axis after the other through Pillow, with its uint8 between them."""
    left, top, width, height = row[Column.LEFT : Column.NEAREST_WIDTH_1]
    out_w, out_h = row[Column.RESIZED_WIDTH], row[Column.RESIZED_HEIGHT]
    kind = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)[row[Column.FILTER]]
    crop = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
    between = (width, out_h) if vertical_first else (out_w, height)
    return torch.from_numpy(np.array(crop.resize(between, kind).resize((out_w, out_h), kind)))


@each_backend
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_passes_in_either_order(backend, policy):
    rng = numbers("order", policy.patch_size)
    differ = 0
    for _ in range(12):
        height, width = (int(x) for x in rng.integers(30, 300, 2))
        left, top = (int(x) for x in rng.integers(0, 10, 2))
        image = noise(height, width, "order")
        plan = plan_regions([(height, width)], [(0, left, top, width, height)], policy)
        row, patch = plan.table[0].tolist(), plan.patch_size
        canvas_h, canvas_w = plan.grids[0][0] * patch, plan.grids[0][1] * patch
        results = {}
        for vertical_first in (True, False):
            pixels = resized(image, row, vertical_first)
            pixels = pixels[row[Column.WINDOW_TOP] :, row[Column.WINDOW_LEFT] :][:canvas_h, :canvas_w]
            canvas = torch.full((canvas_h, canvas_w, 3), 128, dtype=torch.uint8)
            canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
            patches = roi_patches([image], ordered(plan, vertical_first), backend=backend)
            assert_same_bits(patches, patchify(canvas, patch, policy.merge_size))
            results[vertical_first] = patches
        differ += not torch.equal(results[True], results[False])
    assert differ > 6
