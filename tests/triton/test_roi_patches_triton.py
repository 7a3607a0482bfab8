"""Bytes of the Triton backend's resampling against Pillow's own and, in the other pass order, the reference's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.helpers import SEED, assert_same_bits, noise, numbers, photo
from tests.kernels.pillow_parity import Case, expected
from vpt_kernels import RegionPolicy, plan_regions, qwen2_vl_policy, roi_patches, sam_policy
from vpt_kernels.roi_patch_embed.geometry import Column
from vpt_kernels.roi_patch_embed.reference import nearest_indices
from vpt_kernels.roi_patch_embed.triton_tables import _nearest

# Window and border of a geometry, the filter and the pass order go round; sizes, boxes and contents are random.
KINDS = ("plain", "centre", "pad right", "pad bottom", "nearest", "pixel", "tall", "wide", "keep", "shrink")
COUNT = 40


def cases() -> Iterator[tuple[int, Case]]:
    for number in range(COUNT):
        rng = numbers("triton geometry", number)
        yield number, geometry(KINDS[number % len(KINDS)], ("bicubic", "bilinear")[number // 10 % 2], rng)


def geometry(kind: str, resample: str, rng: np.random.Generator) -> Case:
    """Small: every tile of 32 × 32 pixels costs the interpreter a fraction of a second."""

    def size(least: int, most: int) -> int:
        return int(rng.integers(least, most + 1))

    height, width = size(2, 120), size(2, 120)
    if kind in ("tall", "wide"):
        height, width = (size(150, 400), size(1, 4)) if kind == "tall" else (size(1, 4), size(150, 400))
    elif kind == "shrink":
        height, width = size(10, 28), size(10, 28)
    left, top = (0, 0) if rng.random() < 0.4 else (size(0, width - 1), size(0, height - 1))
    right, bottom = (width, height) if rng.random() < 0.4 else (size(left + 1, width), size(top + 1, height))
    if kind == "pixel":
        right, bottom = left + 1, top + 1
    patch, merge = ((14, 2), (14, 1), (16, 1), (16, 2), (2, 3), (5, 2))[size(0, 5)]
    out_h, out_w = (patch * merge * max(1, size(8, 48) // (patch * merge)) for _ in range(2))
    window, anchor, edge = None, "top_left", None
    if kind == "shrink":
        left, top, right, bottom, out_h, out_w, patch, merge = 0, 0, width, height, size(1, 6), size(1, 6), 1, 1
    elif kind == "keep":
        patch, merge, out_h = 1, 1, min(bottom - top, 60)
        bottom = top + out_h
    elif kind == "centre":
        window, anchor = (out_h, out_w), "center"
        out_h, out_w = out_h + size(0, 9), out_w + size(0, 9)
    elif kind == "pad right":
        window, out_w = (out_h, out_w), size(1, out_w)
    elif kind == "pad bottom":
        window, out_h = (out_h, out_w), size(1, out_h)
    elif kind == "nearest":
        edge = (28, 40, 100)[size(0, 2)]
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if rng.random() < 0.5:  # black and white: both clamps of the bicubic overshoot
        pixels = pixels // 128 * 255
    image = torch.from_numpy(pixels)
    return Case(kind, image, (left, top, right, bottom), (out_h, out_w), resample, patch, merge, edge, window, anchor)


@pytest.mark.parametrize("kind", KINDS)
def test_random_geometries_equal_pillow(kind):
    """Both filters of every kind, rows first as Pillow 12.0 does it, and columns first."""
    seen = Counter()
    for number, case in cases():
        if case.kind != kind:
            continue
        plan = plan_regions([tuple(case.image.shape[:2])], [(0, *case.box)], case.policy("hv"))
        vertical = number // 20 % 2 == 1
        if vertical:
            plan.table[:, Column.VERTICAL_FIRST] = 1
        want = roi_patches([case.image], plan, backend="reference") if vertical else expected(case, "hv")
        assert_same_bits(roi_patches([case.image], plan, backend="triton"), want, f"{case} {vertical=} (seed {SEED})")
        seen[case.resample, vertical] += 1
    assert seen == dict.fromkeys(itertools.product(("bicubic", "bilinear"), (False, True)), 1)


@pytest.mark.parametrize("order", (0, 1), ids=("hv", "vh"))
def test_several_products_along_both_axes(order):
    """Reductions whose taps span five chunks of source pixels; two tiles, the second one cut."""
    image = photo("astronaut")[:141, :170].contiguous()
    policy = RegionPolicy(lambda h, w: (28, 42), patch_size=14)
    plan = plan_regions([(141, 170)], [(0, 3, 1, 169, 140)], policy)
    plan.table[:, Column.VERTICAL_FIRST] = order
    assert_same_bits(roi_patches([image], plan, backend="triton"), roi_patches([image], plan, backend="reference"))


@pytest.mark.parametrize("edge, width", ((28, 61), (100, 141), (33, 363), (64, 100), (60, 90), (256, 512), (30, 75)))
def test_nearest_follows_the_accumulated_sum(edge, width):
    """Ratios at which sum and product differ (61 → 28), at which ties are exact (512 → 256), and neither."""
    height = 1 + width // 6
    policy = RegionPolicy(lambda h, w: (h, w), patch_size=1, regularize_edge=edge)
    for image in (noise(height, width, edge), noise(width, height, edge)):
        size = tuple(image.shape[:2])
        plan = plan_regions([size], [(0, 0, 0, size[1], size[0])], policy)
        assert_same_bits(roi_patches([image], plan, backend="triton"), roi_patches([image], plan, backend="reference"))


def test_nearest_indices_of_every_small_axis():
    """Ratios of small numbers, and larger ones at which the sum and the product truncate differently."""
    small = [(i, o) for i in range(1, 41) for o in range(1, 41, 5)]
    rounded = [(i, o) for i in range(60, 400, 7) for o in (30, 45, 90) if product_is_wrong(i, o)]
    assert len(rounded) >= 10
    axes = small + rounded
    wrong = [(i, o) for i, o in axes if not torch.equal(nearest_of(i, o), nearest_indices(i, o))]
    assert not wrong


def product_is_wrong(in_size: int, out_size: int) -> bool:
    product = ((torch.arange(out_size, dtype=torch.float64) + 0.5) * (in_size / out_size)).long()
    return not torch.equal(product, nearest_indices(in_size, out_size))


@triton.jit
def nearest_kernel(out, in_size, out_size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, _nearest(i, in_size, out_size), mask=i < out_size)


def nearest_of(in_size: int, out_size: int) -> torch.Tensor:
    out = torch.empty(out_size, dtype=torch.int64)
    nearest_kernel[(1,)](out, in_size, out_size, BLOCK=128)
    return out


@pytest.mark.parametrize("policy", (qwen2_vl_policy(longest_edge=60), sam_policy(edge=64)), ids=("nearest", "direct"))
def test_any_strides(policy):
    image = noise(61, 83, "strides")
    plan = plan_regions([(61, 83)], [(0, 3, 1, 80, 59)], policy)
    want = roi_patches([image], plan, backend="reference")
    for view in (
        image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        image.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([image, image[..., :1]], -1)[..., :3],
        image.repeat_interleave(2, 0).repeat_interleave(2, 1)[1::2, ::2],
    ):
        assert torch.equal(view, image) and view.stride() != image.stride()
        assert_same_bits(roi_patches([view], plan, backend="triton"), want)


def test_many_images_and_boxes():
    """Ragged regions in one launch; more than one chunk of 64 records."""
    images = [noise(90, 120, 0), noise(300, 31, 1), noise(1, 1, 2), noise(64, 64, 3)]
    sizes = [tuple(image.shape[:2]) for image in images]
    boxes = [(0, 0, 0, 120, 90), (3, 5, 6, 50, 61), (2, 0, 0, 1, 1), (1, 0, 10, 31, 300)]
    plan = plan_regions(sizes, boxes, qwen2_vl_policy(max_pixels=60 * 60))
    assert_same_bits(roi_patches(images, plan, backend="triton"), roi_patches(images, plan, backend="reference"))
    few = RegionPolicy(lambda h, w: (4, 4), patch_size=4)
    many = [(int(i), 0, 0, 1 + int(i) // 3, 1) for i in numbers("many").integers(0, 4, 66)]
    plan = plan_regions(sizes, many, few)
    assert_same_bits(roi_patches(images, plan, backend="triton"), roi_patches(images, plan, backend="reference"))


def test_inputs_stay_and_runs_repeat():
    image = noise(40, 50, "repeat")
    before = image.clone()
    plan = plan_regions([(40, 50)], [(0, 10, 2, 50, 39)], qwen2_vl_policy(longest_edge=40))
    table = plan.table.clone()
    first, second = (roi_patches((image,), plan, backend="triton") for _ in range(2))
    assert_same_bits(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert_same_bits(image, before)
    assert torch.equal(plan.table, table)


def test_every_number_of_the_table_is_checked():
    """What a kernel would follow beyond an image or the output is refused, on the host."""
    image = noise(60, 80, "damaged")
    plan = plan_regions([(60, 80)], [(0, 1, 2, 79, 58)], qwen2_vl_policy())
    refused = torch.ops.vpt_kernels.roi_patches.triton
    damage = {
        Column.IMAGE: (-1, 1),
        Column.LEFT: (-1, 3),
        Column.TOP: (-1, 5),
        Column.WIDTH: (0, 81),
        Column.HEIGHT: (0, 61),
        Column.NEAREST_WIDTH_1: (0, 1 << 21),
        Column.NEAREST_HEIGHT_3: (0, 1 << 21),
        Column.RESIZED_WIDTH: (0, 1 << 21),
        Column.RESIZED_HEIGHT: (-7,),
        Column.FILTER: (-1, 2),
        Column.VERTICAL_FIRST: (-1, 2),
        Column.WINDOW_LEFT: (-1, 500),
        Column.WINDOW_TOP: (-1, 500),
        Column.GRID_WIDTH: (0, 5, 1 << 20),
        Column.GRID_HEIGHT: (0, 3),
        Column.PATCH_SIZE: (13, 16),
        Column.MERGE_SIZE: (0, 5),
        Column.FIRST_ROW: (-1, 1),
    }
    for column, values in damage.items():
        for value in values:
            table = plan.table.clone()
            table[0, column] = value
            with pytest.raises(ValueError, match="plan"):
                refused([image], table, plan.rows, plan.row_bytes)
    with pytest.raises(ValueError, match=f"{plan.rows} patches"):
        refused([image], plan.table, plan.rows + 1, plan.row_bytes)
