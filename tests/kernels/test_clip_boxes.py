"""What models emit as boxes becomes boxes that can be planned, and every change is told."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, seed
from hypothesis import strategies as st

from tests.helpers import SEED
from vpt_kernels import clip_boxes, plan_regions, sam_policy

SIZES = [(60, 80), (31, 47)]
POLICY = sam_policy()


@pytest.mark.parametrize(
    "box, clipped, changes",
    [
        ((0, 1, 2, 70, 50), (0, 1, 2, 70, 50), ()),
        ((0, 1.0, 2, 70.0, 50), (0, 1, 2, 70, 50), ()),
        ((1, 0, 0, 47, 31), (1, 0, 0, 47, 31), ()),
        ((0, -3, 2, 81, 50), (0, 0, 2, 80, 50), ("clipped",)),
        ((0, 70, 50, 1, 2), (0, 1, 2, 70, 50), ("swapped",)),
        ((0, 70, 2, 1, 50), (0, 1, 2, 70, 50), ("swapped",)),
        ((0, 1.5, 2.01, 69.2, 50), (0, 1, 2, 70, 50), ("rounded",)),
        ((0, 70.5, 2, -1, 50), (0, 0, 2, 71, 50), ("swapped", "rounded", "clipped")),
        ((0, 7, 2, 7, 50), (0, 7, 2, 8, 50), ("widened",)),
        ((0, 80, 2, 80, 50), (0, 79, 2, 80, 50), ("widened",)),
        ((0, 90, 70, 99, 80), (0, 79, 59, 80, 60), ("clipped", "widened")),
        ((0, -9, -9, -2, -1), (0, 0, 0, 1, 1), ("clipped", "widened")),
        ((0, -1e300, 0, 1e300, 60), (0, 0, 0, 80, 60), ("clipped",)),
    ],
)
def test_pixels(box, clipped, changes):
    assert clip_boxes([box], SIZES) == ([clipped], [changes])


@pytest.mark.parametrize(
    "box, scale, clipped, changes",
    [
        ((0, 0.25, 0.5, 1, 1), 1, (0, 20, 30, 80, 60), ("scaled",)),
        ((0, 250, 500, 1000, 1000), 1000, (0, 20, 30, 80, 60), ("scaled",)),
        ((0, 250, 500, 1001, 1000), 1000.0, (0, 20, 30, 80, 60), ("scaled", "rounded", "clipped")),
        ((1, 14, 14, 28, 28), (56, 28), (1, 11, 15, 24, 31), ("scaled", "rounded")),
        ((0, 1, 1, 0.25, 0.5), 1, (0, 20, 30, 80, 60), ("scaled", "swapped")),
    ],
)
def test_normalised(box, scale, clipped, changes):
    assert clip_boxes([box], SIZES, scale=scale) == ([clipped], [changes])


def test_arrays_and_tensors_are_boxes():
    boxes = [(0, -3.5, 2, 81, 50), (1, 0, 0, 47, 31)]
    want = clip_boxes(boxes, SIZES)
    assert clip_boxes(np.array(boxes), np.array(SIZES)) == clip_boxes(torch.tensor(boxes), SIZES) == want
    assert clip_boxes([], []) == ([], [])


number = st.one_of(st.floats(-200, 200), st.integers(-200, 200))


@seed(SEED)
@given(
    st.lists(st.tuples(st.integers(0, 1), number, number, number, number), max_size=5), st.sampled_from((None, 1, 99))
)
def test_whatever_comes_in_can_be_planned(boxes, scale):
    clipped, changes = clip_boxes(boxes, SIZES, scale=scale)
    assert plan_regions(SIZES, clipped, POLICY).rows == 4096 * len(boxes)
    assert clip_boxes(clipped, SIZES) == (clipped, [()] * len(boxes))
    for before, after, change in zip(boxes, clipped, changes):
        assert bool(change) == (scale is not None or tuple(before) != after)


@pytest.mark.parametrize(
    "boxes, options, error, named",
    [
        ([(0, math.nan, 0, 1, 1)], {}, ValueError, ["box 0", "nan", "finite"]),
        ([(0, 0, 0, math.inf, 1)], {}, ValueError, ["box 0", "inf", "finite"]),
        ([(2, 0, 0, 1, 1)], {}, ValueError, ["image 2", "2 images"]),
        ([(0.5, 0, 0, 1, 1)], {}, TypeError, ["image 0.5", "integer"]),
        ([(0, 0, 1, 1)], {}, ValueError, ["4 numbers", "left, top, right, bottom"]),
        ([(0, "1", 0, 1, 1)], {}, TypeError, ["'1'", "integers or floats"]),
        ([(0, None, 0, 1, 1)], {}, TypeError, ["box 0", "five numbers"]),
        ([{0, 1, 2, 3, 4}], {}, TypeError, ["box 0 is a set", "no order"]),
        ([dict.fromkeys(range(5))], {}, TypeError, ["box 0 is a dict", "no order"]),
        ([(0, 0, 0, 1e300, 1)], {"scale": 1e-300}, ValueError, ["box 0", "scale 1e-300", "not finite"]),
        ((0, 0, 0, 1, 1), {}, TypeError, ["box 0 is 0", "five numbers"]),
        (None, {}, TypeError, ["boxes is None"]),
        ([(0, 0, 0, 1, 1)], {"scale": 0}, ValueError, ["scale is 0", "positive"]),
        ([(0, 0, 0, 1, 1)], {"scale": math.nan}, ValueError, ["scale is nan", "positive"]),
        ([(0, 0, 0, 1, 1)], {"scale": (1, 2, 3)}, TypeError, ["(1, 2, 3)", "(width, height)"]),
        ([(0, 0, 0, 1, 1)], {"scale": "1000"}, TypeError, ["'1000'", "number"]),
    ],
)
def test_bad_boxes(boxes, options, error, named):
    with pytest.raises(error) as raised:
        clip_boxes(boxes, SIZES, **options)
    for text in named:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "scale", [np.int64(1000), np.float32(1000), Fraction(1000), (np.uint16(1000), 1000.0)], ids=repr
)
def test_a_scale_of_any_real_type(scale):
    boxes = [(0, 100, 200, 512.5, 900)]
    assert clip_boxes(boxes, SIZES, scale=scale) == clip_boxes(boxes, SIZES, scale=1000)


def test_images_without_a_pixel():
    with pytest.raises(ValueError, match="image 0 is 0x30"):
        clip_boxes([(0, 0, 0, 1, 1)], [(0, 30)])
    with pytest.raises(TypeError, match="size of image 0 is 30"):
        clip_boxes([(0, 0, 0, 1, 1)], [30])
