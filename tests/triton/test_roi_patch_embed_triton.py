"""Tokens of the Triton backend, in two launches and in one, against float64; launches and memory of a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    assert_same_bits,
    assert_twice_as_good,
    each_dtype,
    each_model_dtype,
    noise,
    normal,
    photo,
)
from tests.kernels.roi_checks import unfused, valid_pixels, weights
from tests.triton import launches
from vpt_kernels import (
    FoldedPatchEmbed,
    RegionPlan,
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
from vpt_kernels.roi_patch_embed import triton as two_launches
from vpt_kernels.roi_patch_embed import triton_fused
from vpt_kernels.roi_patch_embed.geometry import Column


def in_two_launches(images: list[Tensor], plan: RegionPlan, embed: FoldedPatchEmbed) -> Tensor:
    return roi_patch_embed(images, plan, embed, backend="triton")


def in_one_launch(images: list[Tensor], plan: RegionPlan, embed: FoldedPatchEmbed) -> Tensor:
    out = torch.empty((plan.rows, embed.weight.shape[0]), dtype=embed.weight.dtype)
    triton_fused.embed_in_one_launch(images, plan.table, plan.rows, embed.weight, embed.bias, out)
    return out


each_form = pytest.mark.parametrize("form", (in_two_launches, in_one_launch), ids=("two", "one"))


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test keeps the shipped products."""
    if "shipped" not in request.node.name:
        launches.roi(monkeypatch)


def check(form, images, boxes, policy, weight, bias, mean, std, dtype, vertical_first=False) -> None:
    plan = plan_regions([tuple(image.shape[:2]) for image in images], boxes, policy)
    plan.table[:, Column.VERTICAL_FIRST] = int(vertical_first)
    actual = form(images, plan, fold_patch_weight(weight, mean, std, bias))
    pixels = roi_patches(images, plan, backend="reference")
    valid = valid_pixels(policy, plan, boxes)
    oracle = unfused(pixels, valid, weight, bias, mean, std, torch.float64)
    assert_twice_as_good(actual, unfused(pixels, valid, weight, bias, mean, std, dtype), oracle, f"{policy}")


@each_form
@each_dtype
@pytest.mark.parametrize("content", ("noise", "grey"))
def test_tokens(form, dtype, content):
    """Coherent weights: the errors of a flat image add up."""
    image = noise(50, 70, "tokens") if content == "noise" else torch.full((50, 70, 3), 119, dtype=torch.uint8)
    weight = weights((70, 3, 2, 14, 14), dtype, coherent=True)
    policy = qwen2_vl_policy(max_pixels=56 * 56)
    check(form, [image], [(0, 1, 2, 69, 50)], policy, weight, None, CLIP_MEAN, CLIP_STD, dtype)


@each_form
@each_model_dtype
@pytest.mark.parametrize("merge, vertical_first", ((1, True), (2, False)), ids=("row-major vh", "merged hv"))
def test_many_images_and_boxes(form, dtype, merge, vertical_first):
    images = [noise(60, 84, 0), photo(longest=80), noise(90, 8, 1), noise(2, 3, 2)]
    h, w = images[1].shape[:2]
    boxes = [(1, 0, 0, w, h), (3, 0, 0, 3, 2), (2, 0, 10, 8, 90), (0, 7, 9, 8, 10)]
    policy = qwen2_vl_policy(merge_size=merge, max_pixels=56 * 56)
    weight = weights((24, 3, 14, 14), dtype)
    check(form, images, boxes, policy, weight, None, CLIP_MEAN, CLIP_STD, dtype, vertical_first)


@each_form
@each_dtype
@pytest.mark.parametrize("size", ((60, 37), (37, 60)), ids=("pad right", "pad bottom"))
def test_padding(form, dtype, size):
    """The padded side ends inside a patch; beyond it a patch is the convolution's bias."""
    weight, bias = weights((20, 3, 16, 16), dtype), normal(20, key="bias", dtype=dtype)
    boxes = [(0, 0, 0, size[1], size[0])]
    check(form, [noise(*size)], boxes, sam_policy(edge=64), weight, bias, IMAGENET_MEAN, IMAGENET_STD, dtype)


@each_form
@pytest.mark.parametrize("vertical_first", (False, True), ids=("hv", "vh"))
def test_valid_rows_and_columns(form, vertical_first):
    weight, bias = weights((9, 3, 8, 8), torch.float32, coherent=True), normal(9, key="bias")
    policy = RegionPolicy(lambda h, w: (h, w), patch_size=8, window=(16, 16))
    for valid in (1, 2, 5, 7, 8):
        for size in ((8 + valid, 16), (16, 8 + valid)):
            box = [(0, 0, 0, size[1], size[0])]
            image = noise(*size, "valid")
            check(form, [image], box, policy, weight, bias, CLIP_MEAN, CLIP_STD, torch.float32, vertical_first)


@each_form
def test_centred_window_and_narrow_patches(form):
    weight, bias = weights((33, 3, 14, 14), torch.bfloat16), normal(33, key="bias", dtype=torch.bfloat16)
    plan_of = dinov2_policy(shortest_edge=60, crop=56)
    image, mean_std = noise(70, 90, "window"), (IMAGENET_MEAN, IMAGENET_STD)
    plan = plan_regions([(70, 90)], [(0, 0, 0, 90, 70)], plan_of)
    actual = form([image], plan, fold_patch_weight(weight, *mean_std, bias))
    pixels = roi_patches([image], plan, backend="reference")
    everywhere = torch.ones(plan.rows, 14 * 14, dtype=torch.bool)
    eager, oracle = (
        unfused(pixels, everywhere, weight, bias, *mean_std, dtype) for dtype in (torch.bfloat16, torch.float64)
    )
    assert_twice_as_good(actual, eager, oracle)
    for patch in (1, 5):
        policy = RegionPolicy(lambda h, w, patch=patch: (patch * 2, patch * 3), patch_size=patch)
        narrow = weights((6, 3, patch, patch), torch.float32), normal(6, key="bias")
        check(form, [noise(20, 30)], [(0, 1, 2, 16, 10)], policy, *narrow, CLIP_MEAN, CLIP_STD, torch.float32)


@each_dtype
def test_pixels_of_one_launch_are_exact(dtype):
    """A weight that picks single pixels: tokens are (pixel − 128)/256, whatever the dtype."""
    image = noise(40, 52, "picked")
    plan = plan_regions([(40, 52)], [(0, 0, 0, 52, 40)], qwen2_vl_policy(max_pixels=56 * 56))
    pixels = roi_patches([image], plan, backend="reference")
    embed = FoldedPatchEmbed(torch.eye(588, dtype=dtype), torch.zeros(2, 15, 588), 14)
    for form in (in_one_launch, in_two_launches):
        assert_same_bits(form([image], plan, embed), ((pixels.double() - 128) / 256).to(dtype))


@each_form
@each_dtype
def test_shipped_blocks(form, dtype):
    """Edges of the blocks that are launched on a GPU: neither rows nor columns nor K are multiples."""
    weight = weights((131, 3, 14, 14), dtype)
    policy, images, boxes = qwen2_vl_policy(max_pixels=60 * 60), [noise(50, 50)], [(0, 0, 0, 50, 50), (0, 1, 1, 30, 50)]
    check(form, images, boxes, policy, weight, None, CLIP_MEAN, CLIP_STD, dtype)


def embed_case(dtype: torch.dtype, width: int = 21) -> tuple[list[Tensor], RegionPlan, FoldedPatchEmbed]:
    plan = plan_regions([(34, 50)], [(0, 0, 0, 50, 34), (0, 5, 6, 40, 30)], qwen2_vl_policy(56 * 28, 56 * 28))
    return [noise(34, 50, "into")], plan, fold_patch_weight(weights((width, 3, 14, 14), dtype), CLIP_MEAN, CLIP_STD)


@each_dtype
@pytest.mark.parametrize("row, wider", ((0, 0), (17, 5)))
def test_into_writes_its_rows_only(dtype, row, wider):
    images, plan, embed = embed_case(dtype)
    want = roi_patch_embed(images, plan, embed, backend="triton")
    buffer = torch.full((plan.rows + 17, 21 + 2 * wider), float("nan"), dtype=dtype)
    before = buffer.clone()
    assert roi_patch_embed_into(images, plan, embed, buffer[:, wider : wider + 21], row, backend="triton") is None
    before[row : row + plan.rows, wider : wider + 21] = want
    assert_same_bits(buffer, before)


@each_form
def test_runs_repeat_and_inputs_stay(form):
    images, plan, embed = embed_case(torch.bfloat16)
    kept = [t.clone() for t in (*images, embed.weight, embed.bias, plan.table)]
    assert_same_bits(form(images, plan, embed), form(images, plan, embed))
    for tensor, before in zip((*images, embed.weight, embed.bias, plan.table), kept):
        assert_same_bits(tensor, before)


def test_what_one_launch_declines():
    image, bias = noise(40, 300), torch.zeros(2, 15, 4)
    out, weight = torch.full((4, 4), 7.0), torch.zeros(4, 588)
    plan = plan_regions([(40, 300)], [(0, 0, 0, 300, 40)], RegionPolicy(lambda h, w: (28, 28), patch_size=14))
    with pytest.raises(ValueError, match="44 taps.*33"):
        triton_fused.embed_in_one_launch([image], plan.table, 4, weight, bias, out)
    plan = plan_regions([(40, 300)], [(0, 0, 0, 60, 40)], RegionPolicy(lambda h, w: (34, 34), patch_size=17))
    with pytest.raises(ValueError, match="17.*16"):
        triton_fused.embed_in_one_launch([image], plan.table, 4, torch.zeros(4, 867), torch.zeros(2, 18, 4), out)
    assert (out == 7).all()


class Allocations(TorchDispatchMode):
    """Bytes of every new tensor that is made while this is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (
            function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten._to_copy)
            and result.nbytes
        ):
            self.sizes.append(result.nbytes)
        return result


class Counted:
    """A kernel whose launches are noted in `grids`."""

    def __init__(self, kernel, grids: list) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append((self.kernel.fn.__name__, grid))
        return self.kernel[grid]


def test_launches_and_workspace(monkeypatch):
    """`roi_patches` two launches and a table of coefficients; tokens three, the table, and one byte matrix, 592 bytes a
    patch; the other form one and nothing.
    """
    images, plan, embed = embed_case(torch.bfloat16)
    grids: list = []
    for module, name in (
        (two_launches, "table_kernel"),
        (two_launches, "resample_kernel"),
        (two_launches, "embed_kernel"),
        (triton_fused, "strip_kernel"),
    ):
        monkeypatch.setattr(module, name, Counted(getattr(module, name), grids))
    tokens = plan.rows * 21 * 2
    with Allocations() as made:
        two_launches.roi_patches(images, plan.table, plan.rows, 588)
    # Windows of 56 × 28 and 56 × 56 pixels: a row of the table is 2 + 7 numbers of 4 bytes.
    table = (56 + 28 + 56 + 56) * 9 * 4
    assert grids == [("table_kernel", (8, 2)), ("resample_kernel", (8,))] and made.sizes == [plan.rows * 588, table]
    grids.clear()
    with Allocations() as made:
        two_launches.roi_patch_embed(images, plan.table, plan.rows, embed.weight, embed.bias)
    assert [name for name, _ in grids] == ["table_kernel", "resample_kernel", "embed_kernel"]
    assert made.sizes == [tokens, plan.rows * 592, table]
    grids.clear()
    with Allocations() as made:
        in_one_launch(images, plan, embed)
    assert [name for name, _ in grids] == ["strip_kernel"] and made.sizes == [tokens]
    assert two_launches.patch_row_layout(588) == (592, 588) and two_launches.patch_row_layout(768) == (784, 768)
    assert two_launches.patch_row_layout(75) == (80, 76)
