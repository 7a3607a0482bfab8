"""`roi_patches` and `roi_patch_embed` in Triton on a GPU: the CPU's bytes, bounded tokens, graphs, streams, repeats."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers import CLIP_MEAN, CLIP_STD, assert_same_bits, assert_twice_as_good, each_dtype, noise, normal
from tests.kernels.pillow_parity import KINDS, cases
from vpt_kernels import (
    FoldedPatchEmbed,
    RegionPlan,
    fold_patch_weight,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
    sam_policy,
)
from vpt_kernels.roi_patch_embed.geometry import Column

pytestmark = pytest.mark.gpu

SIZES = ((333, 517), (64, 90), (1200, 900))
BOXES = [(0, 0, 0, 517, 333), (2, 100, 20, 801, 1100), (1, 3, 5, 4, 6), (0, 100, 20, 401, 300)]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pictures(device: str = "cuda") -> list[Tensor]:
    return [noise(*size, number).to(device) for number, size in enumerate(SIZES)]


def planned(vertical_first: bool = False, **options: int) -> RegionPlan:
    plan = plan_regions(SIZES, BOXES, qwen2_vl_policy(max_pixels=500_000, **options))
    plan.table[:, Column.VERTICAL_FIRST] = int(vertical_first)
    return plan


def embedding(dtype: torch.dtype, width: int = 1280) -> FoldedPatchEmbed:
    weight = normal(width, 3, 2, 14, 14, key="gpu weight", scale=0.02)
    embed = fold_patch_weight(weight, CLIP_MEAN, CLIP_STD, normal(width, key="gpu bias"), dtype=dtype)
    return FoldedPatchEmbed(embed.weight.cuda(), embed.bias.cuda(), 14)


@pytest.mark.parametrize("vertical_first", (False, True), ids=("hv", "vh"))
@pytest.mark.parametrize("options", ({}, {"longest_edge": 256}, {"merge_size": 1}, {"patch_size": 16}))
def test_bytes_are_the_cpus(options, vertical_first):
    plan = planned(vertical_first, **options)
    found = roi_patches(pictures(), plan, backend="triton")
    assert_same_bits(found.cpu(), roi_patches(pictures("cpu"), plan, backend="reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_random_geometries(kind):
    for case in cases(52, kinds=(kind,)):
        plan = plan_regions([tuple(case.image.shape[:2])], [(0, *case.box)], case.policy("hv"))
        for vertical_first in (0, 1):
            plan.table[:, Column.VERTICAL_FIRST] = vertical_first
            found = roi_patches([case.image.cuda()], plan, backend="triton").cpu()
            assert_same_bits(found, roi_patches([case.image], plan, backend="reference"), f"{case} {vertical_first}")


def oracle(patches: Tensor, embed: FoldedPatchEmbed, dtype: torch.dtype) -> Tensor:
    wide = torch.float32 if dtype == torch.float16 else dtype
    weight, bias = embed.weight.to(wide), embed.bias[0, -1].to(wide)
    return torch.nn.functional.linear((patches.to(wide) - 128) / 256, weight, bias).to(dtype)


@each_dtype
@pytest.mark.parametrize("repeat", (1, 8), ids=("few rows", "many rows"))
def test_tokens(dtype, repeat):
    """Within twice the error of F.linear on the same GPU (TF32 off), in two launches and in one."""
    from vpt_kernels.roi_patch_embed.triton_fused import embed_in_one_launch

    embed = embedding(dtype)
    plan = plan_regions(SIZES, BOXES * repeat, qwen2_vl_policy(max_pixels=500_000))
    patches = roi_patches(pictures(), plan, backend="triton")
    want, eager = oracle(patches, embed, torch.float64), oracle(patches, embed, dtype)
    found = roi_patch_embed(pictures(), plan, embed, backend="triton")
    assert_twice_as_good(found, eager, want, "two launches")
    found = torch.full_like(found, float("nan"))
    embed_in_one_launch(pictures(), plan.table, plan.rows, embed.weight, embed.bias, found)
    assert_twice_as_good(found, eager, want, "one launch")


def test_pixels_of_both_forms_are_exact():
    """A weight that picks single pixels."""
    from vpt_kernels.roi_patch_embed.triton_fused import embed_in_one_launch

    embed = FoldedPatchEmbed(torch.eye(588, device="cuda"), torch.zeros(2, 15, 588, device="cuda"), 14)
    plan = planned()
    want = (roi_patches(pictures("cpu"), plan, backend="reference").float() - 128) / 256
    found = roi_patch_embed(pictures(), plan, embed, backend="triton")
    assert_same_bits(found.cpu(), want)
    found.fill_(7)
    embed_in_one_launch(pictures(), plan.table, plan.rows, embed.weight, embed.bias, found)
    assert_same_bits(found.cpu(), want)


@each_dtype
def test_padding_and_into(dtype):
    weight, bias = normal(96, 3, 16, 16, key="sam", scale=0.02), normal(96, key="sam bias")
    embed = fold_patch_weight(weight, CLIP_MEAN, CLIP_STD, bias, dtype=dtype)
    on_gpu = FoldedPatchEmbed(embed.weight.cuda(), embed.bias.cuda(), 16)
    plan = plan_regions([(333, 500)], [(0, 0, 0, 500, 333)], sam_policy(edge=256))
    out = torch.full((plan.rows + 9, 96), float("nan"), dtype=dtype, device="cuda")
    roi_patch_embed_into([noise(333, 500).cuda()], plan, on_gpu, out, 4, backend="triton")
    assert out[:4].isnan().all() and out[4 + plan.rows :].isnan().all()
    want = roi_patch_embed([noise(333, 500)], plan, embed, backend="reference")
    torch.testing.assert_close(out[4 : 4 + plan.rows].cpu(), want)


def test_a_second_run_gives_the_same_bits():
    plan, embed = planned(), embedding(torch.bfloat16)
    first = roi_patch_embed(pictures(), plan, embed, backend="triton")
    assert_same_bits(first, roi_patch_embed(pictures(), plan, embed, backend="triton"))


def test_graph_with_new_pixels_between_replays():
    """The captured copy reads its staging buffer in every replay: other calls come between, and the plan dies."""
    images, embed = pictures(), embedding(torch.bfloat16)
    out = torch.empty(planned().rows, 1280, dtype=torch.bfloat16, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        roi_patch_embed_into(images, planned(), embed, out, backend="triton")
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        roi_patch_embed_into(images, planned(), embed, out, backend="triton")
    for number in range(3):
        for other in range(20):  # reuses whatever pinned memory is free
            plan = plan_regions([(40, 60)], [(0, other, 1, 50, 39)], qwen2_vl_policy())
            roi_patches([noise(40, 60).cuda()], plan, backend="triton")
        for image in images:
            image.copy_(noise(*image.shape[:2], "replay", number))
        out.fill_(float("nan"))
        graph.replay()
        assert_same_bits(out, roi_patch_embed(images, planned(), embed, backend="triton"), f"replay {number}")


def test_side_stream():
    """Work is queued on the current stream: it sees pixels that the same stream writes before it."""
    images, plan, embed = pictures(), planned(), embedding(torch.bfloat16)
    want = roi_patch_embed(images, plan, embed, backend="triton")
    blank = [torch.zeros_like(image) for image in images]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, source in zip(blank, images):
            target.copy_(source)
        found = roi_patch_embed(blank, plan, embed, backend="triton")
    stream.synchronize()
    assert_same_bits(found, want)


def test_nothing_waits_for_the_device():
    images, plan, embed = pictures(), planned(), embedding(torch.bfloat16)
    roi_patch_embed(images, plan, embed, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        roi_patch_embed(images, plan, embed, backend="triton")
        roi_patches(images, plan, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_addresses_beyond_32_bits():
    row = (1 << 30) + 7
    storage = torch.zeros(2 * row + 15, dtype=torch.uint8, device="cuda")
    far = storage.as_strided((3, 5, 3), (row, 3, 1))
    far.copy_(noise(3, 5, "far"))
    plan = plan_regions([(3, 5)], [(0, 1, 0, 5, 3)], qwen2_vl_policy())
    found = roi_patches([far], plan, backend="triton")
    assert_same_bits(found.cpu(), roi_patches([noise(3, 5, "far")], plan, backend="reference"))
