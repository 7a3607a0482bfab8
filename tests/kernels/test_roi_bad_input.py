"""Plans and patch embeddings refuse bad input before anything is written, naming value and limit."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests.helpers import CLIP_MEAN, CLIP_STD, assert_same_bits, each_backend, noise, normal
from vpt_kernels import (
    FoldedPatchEmbed,
    RegionPolicy,
    dinov2_policy,
    fold_patch_weight,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
    sam_policy,
)

POLICY = qwen2_vl_policy()
SIZES = [(60, 80), (31, 47)]


def to(height: int, width: int, **options) -> RegionPolicy:
    return RegionPolicy(lambda h, w: (height, width), **options)


PLANS = [
    # boxes or policy, error, what the message names
    ("left of the image", [(0, -1, 0, 20, 20)], POLICY, ValueError, ["-1", "80", "60"]),
    ("above the image", [(0, 0, -3, 20, 20)], POLICY, ValueError, ["-3", "60"]),
    ("right of the image", [(0, 0, 0, 81, 20)], POLICY, ValueError, ["81", "80"]),
    ("below the image", [(0, 0, 0, 20, 61)], POLICY, ValueError, ["61", "60"]),
    ("below the second image", [(0, 0, 0, 20, 20), (1, 0, 0, 20, 32)], POLICY, ValueError, ["box 1", "32", "31"]),
    ("no width", [(0, 7, 0, 7, 20)], POLICY, ValueError, ["7", "empty"]),
    ("no height", [(0, 0, 9, 20, 9)], POLICY, ValueError, ["9", "empty"]),
    ("right before left", [(0, 20, 0, 7, 20)], POLICY, ValueError, ["20", "7"]),
    ("bottom before top", [(0, 0, 20, 7, 2)], POLICY, ValueError, ["20", "2"]),
    ("beyond 32 bits", [(0, 0, 0, (1 << 32) + 20, 20)], POLICY, ValueError, [str((1 << 32) + 20), "80"]),
    ("unknown image", [(2, 0, 0, 20, 20)], POLICY, ValueError, ["2", "2 images"]),
    ("negative image", [(-1, 0, 0, 20, 20)], POLICY, ValueError, ["-1", "2 images"]),
    ("four numbers", [(0, 0, 20, 20)], POLICY, ValueError, ["4", "left, top, right, bottom"]),
    ("one box, no list", (0, 0, 0, 20, 20), POLICY, TypeError, ["box 0 is 0,", "a list of boxes"]),
    ("a tensor of one box", torch.tensor([0, 0, 0, 20, 20]), POLICY, TypeError, ["box 0 is tensor(0)", "a list"]),
    ("no box", [None], POLICY, TypeError, ["box 0 is None", "(image, left, top, right, bottom)"]),
    ("six numbers", [(0, 0, 0, 20, 20, 1)], POLICY, ValueError, ["6", "left, top, right, bottom"]),
    ("fractions", [(0, 0.5, 0, 20, 20)], POLICY, TypeError, ["0.5", "integer"]),
    ("half of an image", [(0.5, 0, 0, 20, 20)], POLICY, TypeError, ["0.5", "integer"]),
    ("not a number", [(0, float("nan"), 0, 20, 20)], POLICY, TypeError, ["nan", "integer"]),
    ("without end", [(0, 0, 0, float("inf"), 20)], POLICY, TypeError, ["inf", "integer"]),
    ("whole, but outside", [(0, 0.0, 0, 81.0, 20)], POLICY, ValueError, ["81", "80"]),
    ("no boxes", None, POLICY, TypeError, ["boxes is None", "a list"]),
    ("boxes of no device", torch.zeros(1, 5, device="meta"), POLICY, TypeError, ["Tensor", "a list"]),
    ("no policy", [(0, 0, 0, 20, 20)], None, TypeError, ["policy is None", "qwen2_vl_policy"]),
    ("a size in fractions", [(0, 0, 0, 20, 20)], to(28.0, 28), TypeError, ["fit", "integers"]),
    ("one number for a size", [(0, 0, 0, 20, 20)], RegionPolicy(lambda h, w: 28), TypeError, ["fit", "28"]),
    ("text", [(0, "1", 0, 20, 20)], POLICY, TypeError, ["'1'", "integer"]),
    ("not a multiple of the patch", [(0, 0, 0, 80, 60)], to(28, 30), ValueError, ["30", "28", "14"]),
    ("not a multiple of patch × merge", [(0, 0, 0, 80, 60)], to(28, 42, merge_size=2), ValueError, ["42", "14 x 2"]),
    ("resized to nothing", [(0, 0, 0, 80, 60)], to(0, 28), ValueError, ["0x28"]),
    ("resized to a negative size", [(0, 0, 0, 80, 60)], to(28, -14), ValueError, ["-14"]),
    ("resized beyond the limit", [(0, 0, 0, 80, 60)], to(28, 14 << 20), ValueError, [str(14 << 20), str(1 << 20)]),
    (
        "window not a multiple of the patch",
        [(0, 0, 0, 80, 60)],
        to(20, 20, window=(15, 14)),
        ValueError,
        ["15", "14"],
    ),
    (
        "centred window outside the image",
        [(0, 0, 0, 80, 60)],
        to(14, 27, window=(14, 28), anchor="center"),
        ValueError,
        ["14x27", "14x28", "top_left"],
    ),
    (
        "padding on both sides",
        [(0, 0, 0, 80, 60)],
        to(27, 27, window=(28, 28)),
        ValueError,
        ["27x27", "28x28", "both"],
    ),
]


@pytest.mark.parametrize("boxes, policy, error, named", [row[1:] for row in PLANS], ids=[row[0] for row in PLANS])
def test_plans(boxes, policy, error, named):
    with pytest.raises(error) as raised:
        plan_regions(SIZES, boxes, policy)
    for text in named:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "size, policy, named",
    [
        ((1, 201), POLICY, ["1x201", "201", "200", "longest_edge"]),
        ((402, 2), POLICY, ["402x2", "201", "200"]),
        (((1 << 20) + 1, 30), sam_policy(), [str((1 << 20) + 1), str(1 << 20)]),
        ((0, 30), sam_policy(), ["0x30"]),
        ((30, -1), dinov2_policy(), ["30x-1"]),
        ((2000, 1), to(1, 1 << 21, patch_size=1), [str(1 << 21), str(1 << 20)]),
    ],
)
def test_image_sizes(size, policy, named):
    with pytest.raises(ValueError) as raised:
        plan_regions([size], [(0, 0, 0, max(size[1], 1), max(size[0], 1))], policy)
    for text in named:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"resample": "lanczos"}, ["lanczos", "bicubic", "bilinear"]),
        ({"pass_order": "vh"}, ["vh", "hv", "installed"]),
        ({"anchor": "bottom"}, ["bottom", "center", "top_left"]),
        ({"patch_size": 0}, ["0", "1"]),
        ({"merge_size": -1}, ["-1", "1"]),
        ({"regularize_edge": 0}, ["longest edge", "0", "at least 1"]),
        ({"regularize_edge": -1}, ["longest edge", "-1", "at least 1"]),
        ({"window": (0, 14)}, ["height", "0", "at least 1"]),
    ],
)
def test_policies(options, named):
    with pytest.raises(ValueError) as raised:
        to(28, 28, **options)
    for text in named:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "make, options, named",
    [
        *(
            (make, {"longest_edge": edge}, [str(edge), "at least 1"])
            for make in (qwen2_vl_policy, dinov2_policy, sam_policy)
            for edge in (0, -1)
        ),
        (qwen2_vl_policy, {"max_pixels": 0}, ["max_pixels 0", "positive"]),
        (qwen2_vl_policy, {"min_pixels": 0}, ["min_pixels 0", "positive"]),
        (qwen2_vl_policy, {"min_pixels": 5000, "max_pixels": 4000}, ["5000", "4000", "order"]),
        (dinov2_policy, {"shortest_edge": 0}, ["shortest_edge is 0", "at least 1"]),
        (dinov2_policy, {"crop": -14}, ["-14", "at least 1"]),
        (sam_policy, {"edge": 0}, ["edge is 0", "at least 1"]),
    ],
)
def test_limits_of_policies(make, options, named):
    """Elsewhere an edge of 0 or −1 means "no limit"; here it once reduced the picture to one pixel."""
    with pytest.raises(ValueError) as raised:
        make(**options)
    for text in named:
        assert text in str(raised.value)


@pytest.mark.parametrize("make", [qwen2_vl_policy, dinov2_policy, sam_policy])
def test_limits_of_policies_are_integers(make):
    with pytest.raises(TypeError, match="512.0; it must be an integer"):
        make(longest_edge=512.0)


WEIGHT = torch.zeros(5, 3, 14, 14)
FOLDS = [
    ("channels", dict(weight=torch.zeros(5, 4, 14, 14)), ValueError, ["(5, 4, 14, 14)", "[E, 3, p, p]"]),
    ("rank", dict(weight=torch.zeros(5, 588)), ValueError, ["(5, 588)", "[E, 3, p, p]"]),
    ("oblong patch", dict(weight=torch.zeros(5, 3, 14, 16)), ValueError, ["(5, 3, 14, 16)"]),
    ("mean", dict(mean=(0.5,)), ValueError, ["(0.5,)", "three"]),
    ("std", dict(std=(0.5, 0.0, 0.5)), ValueError, ["0.0", "positive"]),
    ("bias", dict(bias=torch.zeros(6)), ValueError, ["(6,)", "5"]),
    ("bias rank", dict(bias=torch.zeros(5, 1)), ValueError, ["(5, 1)", "5"]),
    ("integer weight", dict(weight=WEIGHT.int()), TypeError, ["int32"]),
    ("gradient", dict(weight=WEIGHT.clone().requires_grad_()), ValueError, ["weight", "no_grad", "detach"]),
]


@pytest.mark.parametrize("change, error, named", [row[1:] for row in FOLDS], ids=[row[0] for row in FOLDS])
def test_folds(change, error, named):
    with pytest.raises(error) as raised:
        fold_patch_weight(**{"weight": WEIGHT, "mean": CLIP_MEAN, "std": CLIP_STD, **change})
    for text in named:
        assert text in str(raised.value)


def images() -> list[torch.Tensor]:
    return [noise(*size) for size in SIZES]


def planned():
    return plan_regions(SIZES, [(0, 1, 2, 70, 50), (1, 0, 0, 47, 31)], POLICY)


def first(change) -> list[torch.Tensor]:
    return [change(images()[0]), images()[1]]


IMAGES = [
    ("float pixels", lambda: first(lambda t: t.float() / 255), TypeError, ["image 0", "float32", "uint8"]),
    ("signed pixels", lambda: first(lambda t: t.to(torch.int8)), TypeError, ["image 0", "int8", "uint8"]),
    ("booleans", lambda: first(lambda t: t > 3), TypeError, ["image 0", "bool", "uint8"]),
    ("CHW", lambda: first(lambda t: t.permute(2, 0, 1)), ValueError, ["image 0", "(3, 60, 80)", "HWC"]),
    ("grey", lambda: first(lambda t: t[..., 0]), ValueError, ["image 0", "(60, 80)", "HWC"]),
    ("RGBA", lambda: first(lambda t: torch.cat([t, t[..., :1]], -1)), ValueError, ["(60, 80, 4)", "HWC"]),
    ("a batch", lambda: first(lambda t: t[None]), ValueError, ["(1, 60, 80, 3)", "HWC"]),
    ("one tensor", lambda: images()[0], TypeError, ["list", "uint8"]),
    ("numpy", lambda: [t.numpy() for t in images()], TypeError, ["image 0", "ndarray"]),
    ("smaller image", lambda: first(lambda t: t[:-1]), ValueError, ["(59, 80)", "(60, 80)", "plan"]),
    ("larger image", lambda: first(lambda t: noise(61, 80)), ValueError, ["(61, 80)", "(60, 80)", "plan"]),
    ("swapped images", lambda: images()[::-1], ValueError, ["(31, 47)", "(60, 80)", "plan"]),
    ("missing image", lambda: images()[:1], ValueError, ["(60, 80)", "plan"]),
    ("extra image", lambda: [*images(), noise(3, 3)], ValueError, ["(3, 3)", "plan"]),
    ("no image", list, ValueError, ["empty"]),
    ("another device", lambda: first(lambda t: t.to("meta")), ValueError, ["meta", "cpu"]),
]
WIDTH = 6


def embedding(patch: int = 14, dtype: torch.dtype = torch.float32) -> FoldedPatchEmbed:
    return fold_patch_weight(normal(WIDTH, 3, patch, patch, key="bad", dtype=dtype), CLIP_MEAN, CLIP_STD)


def refuses(call, error, named, *untouched: torch.Tensor) -> None:
    kept = [t.clone() for t in untouched]
    with pytest.raises(error) as raised:
        call()
    for text in named:
        assert text in str(raised.value)
    for tensor, before in zip(untouched, kept, strict=True):
        assert_same_bits(tensor, before, "output after an error")


@each_backend
@pytest.mark.parametrize("given, error, named", [row[1:] for row in IMAGES], ids=[row[0] for row in IMAGES])
def test_images(backend, given, error, named):
    plan, embed, out = planned(), embedding(), torch.full((planned().rows, WIDTH), float("nan"))
    refuses(lambda: roi_patches(given(), plan, backend=backend), error, named)
    refuses(lambda: roi_patch_embed(given(), plan, embed, backend=backend), error, named)
    refuses(lambda: roi_patch_embed_into(given(), plan, embed, out, backend=backend), error, named, out)


def part(weight=lambda t: t, bias=lambda t: t) -> FoldedPatchEmbed:
    whole = embedding()
    return FoldedPatchEmbed(weight(whole.weight), bias(whole.bias), 14)


WEIGHTS = [
    ("patch size", lambda: embedding(16), ValueError, ["16", "14"]),
    ("device", lambda: part(weight=lambda t: t.to("meta")), ValueError, ["meta", "cpu"]),
    ("columns", lambda: part(weight=lambda t: t[:, :-3]), ValueError, ["585", "588"]),
    ("bias rows", lambda: part(bias=lambda t: t[:, :-1]), ValueError, ["bias", "14"]),
    ("bias columns", lambda: part(bias=lambda t: t[..., :-1]), ValueError, ["bias", "5", "6"]),
    ("bias dtype", lambda: part(bias=lambda t: t.bfloat16()), TypeError, ["bias", "bfloat16", "float32"]),
    ("gradient", lambda: part(weight=lambda t: t.requires_grad_()), ValueError, ["weight", "no_grad"]),
]


@each_backend
@pytest.mark.parametrize("embed, error, named", [row[1:] for row in WEIGHTS], ids=[row[0] for row in WEIGHTS])
def test_weights(backend, embed, error, named):
    plan, out = planned(), torch.full((planned().rows, WIDTH), float("nan"))
    refuses(lambda: roi_patch_embed(images(), plan, embed(), backend=backend), error, named)
    refuses(lambda: roi_patch_embed_into(images(), plan, embed(), out, backend=backend), error, named, out)


@each_backend
def test_outputs(backend):
    plan, embed = planned(), embedding()
    rows = plan.rows

    def full(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    for out, row, error, named in (
        (full(rows - 1, WIDTH), 0, ValueError, [str(rows), str(rows - 1)]),
        (full(rows, WIDTH), 1, ValueError, [str(rows + 1), str(rows)]),
        (full(rows, WIDTH), -1, ValueError, ["-1"]),
        (full(rows, WIDTH), 1 << 40, ValueError, [str(1 << 40), str(rows)]),
        (full(rows, WIDTH + 1), 0, ValueError, [f"({rows}, {WIDTH + 1})", str(WIDTH)]),
        (full(WIDTH, rows).T, 0, ValueError, ["contiguous"]),
        (full(rows, 1, WIDTH), 0, ValueError, ["3 dimensions", "2"]),
        (full(rows, WIDTH, dtype=torch.bfloat16), 0, TypeError, ["out", "bfloat16", "float32"]),
        (full(rows, WIDTH, dtype=torch.float64), 0, TypeError, ["out", "float64", "float32"]),
        (full(rows, WIDTH).requires_grad_(), 0, ValueError, ["out", "no_grad"]),
    ):
        refuses(partial(roi_patch_embed_into, images(), plan, embed, out, row, backend=backend), error, named, out)
    refuses(
        lambda: roi_patch_embed_into(images(), plan, embed, full(rows, WIDTH).to("meta"), backend=backend),
        ValueError,
        ["out", "meta", "cpu"],
    )
    refuses(
        lambda: roi_patch_embed_into(images(), plan, embed, np.zeros((rows, WIDTH)), backend=backend),
        TypeError,
        ["out", "ndarray"],
    )


@pytest.mark.parametrize(
    "column, value",
    [(0, 2), (0, -1), (3, 79), (3, -1), (5, 81), (7, 1 << 24), (13, 1 << 24), (17, 99), (19, 99), (21, 16), (23, 4000)],
)
def test_a_damaged_plan_is_not_followed(column, value):
    """The compiled operator checks the table itself: it never reads or writes beyond the tensors it is given."""
    plan = planned()
    plan.table[0, column] = value
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.vpt_kernels.roi_patches.cpp(images(), plan.table, plan.rows, 588)
