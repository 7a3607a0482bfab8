"""The folded weight's rows are padded inside, so that kernels read 16 bytes at once; nobody else can tell."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch

from tests.helpers import CLIP_MEAN, CLIP_STD, assert_same_bits, each_backend, noise, normal
from vpt_kernels import FoldedPatchEmbed, RegionPolicy, fold_patch_weight, plan_regions, roi_patch_embed
from vpt_kernels.layers import RoiPatchEmbed
from vpt_kernels.library import OPS

WIDTH = 7
each_patch = pytest.mark.parametrize("patch, padded", ((14, 592), (16, 768), (5, 80)))


def folded(patch: int = 14, dtype: torch.dtype = torch.float32) -> FoldedPatchEmbed:
    return fold_patch_weight(normal(WIDTH, 3, patch, patch, key="w"), CLIP_MEAN, CLIP_STD, dtype=dtype)


def planned(patch: int):
    policy = RegionPolicy(lambda h, w: (2 * patch, patch), patch_size=patch)
    return [noise(30, 20, "padded")], plan_regions([(30, 20)], [(0, 0, 0, 20, 30)], policy)


def call(backend: str, embed: FoldedPatchEmbed) -> torch.Tensor:
    return roi_patch_embed(*planned(embed.patch_size), embed, backend=backend)


@each_patch
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("mode", (False, True), ids=("", "inference"))
def test_rows_begin_at_multiples_of_16_bytes(patch, padded, dtype, mode):
    with torch.inference_mode(mode):
        embed = folded(patch, dtype)
    rows, columns = embed._rows(), 3 * patch * patch
    assert embed.weight.shape == (WIDTH, columns) and embed.weight.is_contiguous() and "padded" not in repr(embed)
    assert rows.shape == (WIDTH, padded) and rows.is_contiguous() and rows.stride(0) * rows.itemsize % 16 == 0
    assert_same_bits(rows[:, :columns], embed.weight)
    assert not rows[:, columns:].any() and embed._rows() is rows


@each_backend
@each_patch
def test_padding_changes_no_bit(backend, patch, padded):
    """Operators take the padded matrix, its view without the padding, and rows without gaps."""
    embed = folded(patch)
    images, plan = planned(patch)
    want, operator, rows = call(backend, embed), OPS["roi_patch_embed"][backend], embed._rows()
    for weight in (rows, rows[:, : 3 * patch * patch], embed.weight):
        assert_same_bits(operator(images, plan.table, plan.rows, weight, embed.bias), want, str(weight.stride()))
    if backend != "reference":
        with pytest.raises((ValueError, RuntimeError), match="fold_patch_weight"):
            operator(images, plan.table, plan.rows, rows[:, :-17], embed.bias)


@each_backend
def test_copies_and_changes(backend):
    """Copies are padded again; what is written into the weight is what is multiplied."""
    embed = folded()
    want = call(backend, embed)
    stored = io.BytesIO()
    torch.save(embed, stored)
    stored.seek(0)
    others = [
        FoldedPatchEmbed(embed.weight.clone(), embed.bias, 14),
        replace(embed, bias=embed.bias.clone()),
        copy.deepcopy(embed),
        pickle.loads(pickle.dumps(embed)),
        torch.load(stored, weights_only=False),
    ]
    for other in others:
        assert other.weight.shape == (WIDTH, 588) and other._rows().shape == (WIDTH, 592)
        assert_same_bits(call(backend, other), want)
    half = call(backend, FoldedPatchEmbed(embed.weight * 0.5, embed.bias, 14))
    assert not torch.equal(half, want)
    embed.weight.mul_(0.5)
    assert_same_bits(call(backend, embed), half)
    with torch.inference_mode():
        embed.weight.mul_(2)
    assert_same_bits(call(backend, embed), want)
    embed.weight.data = embed.weight.data * 0.5
    assert_same_bits(call(backend, embed), half)


def test_the_layer_follows_its_state():
    """Its buffers are what they were; what is loaded into them, in place or in their stead, is multiplied."""
    policy = RegionPolicy(lambda h, w: (28, 14), patch_size=14)
    weights = [normal(WIDTH, 3, 14, 14, key=name) for name in "ab"]
    first, second = (RoiPatchEmbed(weight, CLIP_MEAN, CLIP_STD, policy) for weight in weights)
    state = second.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {"weight": (WIDTH, 588), "bias": (2, 15, WIDTH)}
    assert all(t.is_contiguous() for t in state.values())
    images, _ = planned(14)
    want, other = second(images)[0], first(images)[0]
    assert not torch.equal(want, other)
    for assign in (False, True):
        layer = RoiPatchEmbed(weights[0], CLIP_MEAN, CLIP_STD, policy)
        assert_same_bits(layer(images)[0], other)
        layer.load_state_dict(state, assign=assign)
        assert_same_bits(layer(images)[0], want)
        assert_same_bits(copy.deepcopy(layer)(images)[0], want)
