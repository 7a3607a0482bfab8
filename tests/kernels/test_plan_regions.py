"""Sizes, grids and offsets of plans: transformers' resize rules and the regularisation before them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, seed
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tests.helpers import SEED
from vpt_kernels import RegionPolicy, dinov2_policy, plan_regions, qwen2_vl_policy, sam_policy

side = st.integers(1, 5000)


def grid(height: int, width: int, policy: RegionPolicy) -> tuple[int, int]:
    return plan_regions([(height, width)], [(0, 0, 0, width, height)], policy).grids[0]


@seed(SEED)
@given(side, side, st.sampled_from((14, 16)), st.sampled_from((1, 2)))
def test_qwen2_vl_sizes_are_transformers(height, width, patch, merge):
    limits = {"min_pixels": 3136, "max_pixels": 1_003_520}
    policy = qwen2_vl_policy(**limits, patch_size=patch, merge_size=merge)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200"):
            grid(height, width, policy)
        return
    resized = smart_resize(height, width, factor=patch * merge, **limits)
    assert grid(height, width, policy) == (resized[0] // patch, resized[1] // patch)


@pytest.mark.parametrize(
    "source, patches",
    [
        ((640, 480), 1008), ((1024, 768), 1008), ((640, 427), 864), ((1024, 683), 864), ((500, 375), 936),
        ((480, 640), 1008), ((512, 512), 1296), ((3000, 3000), 1296), ((1700, 2200), 1008), ((2550, 3300), 1008),
        ((1654, 2339), 936), ((2000, 1125), 720), ((224, 224), 256),
    ],
)  # fmt: skip
def test_patches_of_common_photographs(source, patches):
    width, height = source
    rows, columns = grid(height, width, qwen2_vl_policy(longest_edge=512))
    assert rows * columns == patches


@pytest.mark.parametrize(
    "source, box, resized",
    [
        ((1700, 2200), (0, 275, 1275, 1100), (504, 336)),
        ((640, 480), (160, 120, 400, 300), (252, 168)),
        ((640, 480), (0, 120, 640, 360), (504, 196)),
        ((500, 375), (62, 187, 437, 375), (364, 196)),
        ((1024, 768), (0, 0, 1024, 768), (504, 392)),
        ((101, 77), (75, 0, 101, 19), (56, 56)),
    ],
)
def test_published_crops(source, box, resized):
    """(width, height) of the published crop vectors after regularisation and resize."""
    plan = plan_regions([source[::-1]], [(0, *box)], qwen2_vl_policy(longest_edge=512))
    assert plan.grids == ((resized[1] // 14, resized[0] // 14),)
    assert plan.rows == resized[0] * resized[1] // 196


@pytest.mark.parametrize("longest", (513, 561, 569, 644, 685, 691, 694, 725, 1024))
def test_longest_edge_truncates_in_double(longest):
    """int(n · (512 / n)) is 511 for some n, and such an image resizes as 511 wide."""
    seen = []

    def fit(height: int, width: int) -> tuple[int, int]:
        seen.append((height, width))
        return 14, 14

    plan_regions([(longest, 300)], [(0, 0, 0, 300, longest)], RegionPolicy(fit, regularize_edge=512))
    factor = 512 / longest
    assert seen == [(int(longest * factor), int(300 * factor))]
    assert (seen[0][0] == 511) == (longest not in (513, 1024))


@pytest.mark.parametrize(
    "size, after",
    [
        ((10, 10), (28, 28)), ((10, 400), (28, 400)), ((28, 5601), (28, 511)), ((2, 5000), (28, 512)),
        ((5000, 2), (512, 28)), ((27, 512), (28, 512)), ((28, 28), (28, 28)), ((1, 1), (28, 28)),
    ],
)  # fmt: skip
def test_small_edges_are_widened(size, after):
    seen = []
    policy = RegionPolicy(lambda h, w: seen.append((h, w)) or (14, 14), regularize_edge=512)
    plan_regions([size], [(0, 0, 0, size[1], size[0])], policy)
    assert seen == [after]


@pytest.mark.parametrize("size, after", [((28, 5601), (28, 5040)), ((5601, 28), (5040, 28)), ((28, 5600), (28, 5600))])
def test_elongated_crops_are_cut_to_180(size, after):
    seen = []
    policy = RegionPolicy(lambda h, w: seen.append((h, w)) or (14, 14), regularize_edge=6000)
    plan_regions([size], [(0, 0, 0, size[1], size[0])], policy)
    assert seen == [after]


@seed(SEED)
@given(st.integers(1, 4096), st.integers(1, 4096))
def test_dinov2_window_is_always_inside(height, width):
    """Up to 1:4096; beyond that the resized length would leave the limit of 2^20."""
    policy = dinov2_policy()
    assert grid(height, width, policy) == (16, 16)
    fitted = policy.fit(height, width)
    assert min(fitted) == 256 and max(fitted) == int(256 * max(height, width) / min(height, width))


@seed(SEED)
@given(side, side)
def test_sam_fills_one_axis(height, width):
    policy = sam_policy()
    assert grid(height, width, policy) == (64, 64)
    assert max(policy.fit(height, width)) == 1024 and min(policy.fit(height, width)) >= 1


def test_boxes_of_any_integer_type():
    policy = qwen2_vl_policy()
    want = plan_regions([(60, 80)], [(0, 1, 2, 70, 50)], policy)
    numbers = [0, 1, 2, 70, 50]
    floats = (np.array(numbers, np.float32), torch.tensor(numbers).double(), [0, 1.0, 2, 70.0, np.float64(50)])
    for box in (np.array(numbers), torch.tensor(numbers), numbers, *floats):
        assert torch.equal(plan_regions([torch.Size([60, 80])], [box], policy).table, want.table)
    for boxes in (np.array([numbers]), torch.tensor([numbers]), torch.tensor([numbers]).float()):
        assert torch.equal(plan_regions([(60, 80)], boxes, policy).table, want.table)
    assert want.sizes == ((60, 80),)
    for box in (set(numbers), frozenset(numbers), dict.fromkeys(numbers)):
        with pytest.raises(TypeError, match="box 0 is a .*no order"):
            plan_regions([(60, 80)], [box], policy)
    with pytest.raises(AttributeError):
        want.rows = 3


def test_rows_beyond_31_bits_are_refused():
    policy = RegionPolicy(lambda h, w: (1 << 16, 1 << 15), patch_size=1)
    with pytest.raises(ValueError, match=r"2\^31"):
        plan_regions([(10, 10)], [(0, 0, 0, 10, 10)], policy)
