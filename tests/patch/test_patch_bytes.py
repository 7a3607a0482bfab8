"""uint8 patches through a whole patched model: it says what it says to transformers' pixel values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers import assert_same_bits, noise
from tests.patch import foreign
from tests.patch.foreign import BOUND, each_qwen, largest
from vpt_kernels import QwenVLImageProcessor, patch
from vpt_kernels.roi_patch_embed.geometry import plan_regions, qwen2_vl_policy

SIZES = {"1 image": [(70, 98)], "3 images": [(70, 98), (130, 61), (90, 90)]}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: foreign.qwen(kind) for kind in foreign.QWEN}


def normalised(patches: torch.Tensor, processor: QwenVLImageProcessor, kind: str) -> torch.Tensor:
    """transformers' pixel values [N, 3·T·p·p] of uint8 patches [N, p·p·3], computed in float64."""
    from vpt_kernels.patch.supported import CLIP, HALF

    p = processor.policy.patch_size
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (HALF if kind == "qwen3_vl" else CLIP))
    pixels = ((patches.double().reshape(-1, p, p, 3) / 255 - mean) / std).permute(0, 3, 1, 2)
    return pixels[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(patches), -1).float()


@each_qwen
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_generate_from_uint8_patches(models, kind, sizes, dtype) -> None:
    """The model casts them to the dtype of its weights on the way: every byte survives that."""
    model = models[kind] if dtype == torch.float32 else copy.deepcopy(models[kind]).to(dtype)
    processor = QwenVLImageProcessor.of(model)
    pictures = [noise(*size, kind) for size in sizes]
    patches, grid = processor.patches(pictures), processor(pictures)["image_grid_thw"]
    assert patches.dtype == torch.uint8 and {0, 255} <= set(patches.unique().tolist())
    made = foreign.prompt(model, [[tuple(size[1:]) for size in grid.tolist()]])
    made.inputs["pixel_values"] = normalised(patches, processor, kind)
    before_ids, before = foreign.generate(model, made)
    made.inputs["pixel_values"] = patches
    with patch(model) as report:
        ids, logits = foreign.generate(model, made)
    assert report.calls["roi_patch_embed"] == 1 and not report.calls["linear"]
    if dtype == torch.float32:
        assert largest(logits, before) < BOUND < before.std() and torch.equal(ids, before_ids)
    else:
        assert largest(logits[0], before[0]) < 0.25 * before[0].std()


@each_qwen
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_cast_patches_are_the_same_bytes(models, kind, dtype) -> None:
    embed = copy.deepcopy(models[kind].model.visual.patch_embed).to(dtype)
    patches = torch.arange(256).repeat(3 * embed.patch_size**2)[: 4 * 3 * embed.patch_size**2]
    patches = patches.to(torch.uint8).view(4, -1)
    with patch(embed) as report, torch.no_grad():
        assert_same_bits(embed(patches.to(dtype)), embed(patches))
        for wrong in (0.5, -1.0, 256.0, float("nan")):
            cast = patches.to(dtype)
            cast[1, 2] = wrong
            with pytest.raises(ValueError, match="not all whole numbers in 0…255"):
                embed(cast)
    assert report.calls == {"roi_patch_embed": 2}


def test_patches_that_look_like_embeddings() -> None:
    """Where both are as wide, neither the processor nor the model guesses."""
    embed = foreign.qwen("qwen2_vl").model.visual.patch_embed
    width = 3 * embed.patch_size**2
    embed.embed_dim, embed.proj = width, nn.Conv3d(3, width, (2, 14, 14), (2, 14, 14), bias=False)
    patches = noise(1, width, "wide").flatten()[: 2 * width].view(2, width)
    with patch(embed), torch.no_grad():
        assert embed(patches).shape == (2, width)
        with pytest.raises(ValueError, match="or embeddings, which are as wide in this model"):
            embed(patches.float())
    with pytest.raises(ValueError, match="could not tell embeddings from those"):
        QwenVLImageProcessor(embed.proj.weight.detach(), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_patches_without_a_gradient_for_the_weight(models) -> None:
    """As the operators: an error where autograd would lose the weight; none where it is frozen."""
    embed = copy.deepcopy(models["qwen2_vl"].model.visual.patch_embed)
    patches = torch.zeros(4, 588, dtype=torch.uint8)
    with patch(embed) as report:
        with torch.no_grad():
            expected = embed(patches)
        with pytest.raises(ValueError, match="weight requires grad, but this operator is forward only"):
            embed(patches)
        embed.requires_grad_(False)
        assert_same_bits(embed(patches), expected)
    assert report.calls == {"roi_patch_embed": 2}


def test_patches_need_the_plain_convolution(models) -> None:
    embed = copy.deepcopy(models["qwen2_vl"].model.visual.patch_embed)
    plan = plan_regions([(56, 56)], [(0, 0, 0, 56, 56)], qwen2_vl_policy())
    with patch(embed), torch.no_grad():
        embed.proj.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="uint8 patches cannot be embedded: its projection has hooks"):
            embed(torch.zeros(plan.rows, 588, dtype=torch.uint8))
