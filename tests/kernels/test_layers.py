"""The modules give what the functions give, and survive .to()."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from vpt_kernels import (
    append_visual_kv,
    backends,
    control_cross_attention,
    fold_projector,
    qwen2_vl_policy,
    rotary_table,
)
from vpt_kernels.layers import AppendVisualKV, ControlCrossAttention, RoiPatchEmbed

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def test_roi_patch_embed_equals_the_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(32, 3, 14, 14, generator=generator) / 24)
    image = torch.randint(0, 256, (56, 84, 3), dtype=torch.uint8, generator=generator)
    layer = RoiPatchEmbed(weight, MEAN, STD, qwen2_vl_policy(merge_size=1))
    tokens, grids = layer([image, image], [(1, 0, 0, 84, 56)])
    pixels = ((image.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()).permute(2, 0, 1)
    expected = conv2d(pixels[None], weight.detach().double(), stride=14)[0].flatten(1).T
    assert grids == ((4, 6),)
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-5, atol=1e-5)
    whole, grids = layer([image, image])
    assert grids == ((4, 6), (4, 6)) and torch.equal(whole[24:], tokens)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_roi_patch_embed_in_other_dtypes(dtype: torch.dtype) -> None:
    """The weight is converted, the bias keeps its digits, also on the way back."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 3, 14, 14, generator=generator) / 24, torch.randn(32, generator=generator)
    image = torch.randint(0, 256, (56, 84, 3), dtype=torch.uint8, generator=generator)
    layer = RoiPatchEmbed(weight, MEAN, STD, qwen2_vl_policy(), bias)
    expected, exact = layer([image])[0], layer.bias.clone()
    layer.to(dtype)
    tokens, _ = layer([image])
    assert tokens.dtype == layer.weight.dtype == dtype
    assert layer.bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(tokens.float(), expected, rtol=0.02, atol=0.05)
    assert torch.equal(layer.float().bias, exact) and layer([image])[0].dtype == torch.float32


def test_control_cross_attention() -> None:
    norm, linear = (torch.rand(48), torch.randn(48)), (torch.randn(48, 48) / 7, torch.randn(48))
    projector = fold_projector("identity", condition_norm=norm, condition=linear)
    features, control = torch.randn(2, 5, 48), torch.randn(2, 48)
    layer = ControlCrossAttention(projector)
    assert torch.equal(layer(features, control), control_cross_attention(features, control, projector))
    narrow = layer.to(torch.bfloat16)(features.bfloat16(), control.bfloat16())
    torch.testing.assert_close(narrow.float(), layer.float()(features, control), rtol=0.05, atol=0.5)


def test_append_keeps_its_table_in_float32() -> None:
    layer = AppendVisualKV(rotary_table(40, 64), (8, 12, 12)).to(torch.bfloat16)
    assert layer.cos_sin.dtype == torch.float32
    q, k, v = (torch.randn(3, heads, 64) for heads in (4, 2, 2))
    positions, slots = torch.randint(0, 40, (3, 3)), torch.tensor([4, 0, 2])
    caches = [torch.zeros(8, 2, 64) for _ in range(4)]
    rotated = layer(q, k, v, positions, slots, *caches[:2])
    expected = append_visual_kv(q, k, v, rotary_table(40, 64), positions, slots, *caches[2:], (8, 12, 12))
    assert torch.equal(rotated, expected)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def test_score_maps_follow_the_weights(monkeypatch) -> None:
    """Converted weights get maps of their own, in float32; they are no part of the state."""
    monkeypatch.setitem(backends.CAPABILITIES["control_cross_attention"], "triton", backends._CPP)
    pair, wide = (torch.rand(8), torch.randn(8)), (torch.randn(8, 8), torch.randn(8))
    given = {"condition_norm": pair, "condition": wide, "feature_norm": (torch.rand(4), torch.randn(4))}
    layer = ControlCrossAttention(fold_projector("linear", **given, feature=(torch.randn(8, 4), torch.randn(8))))
    before = layer.score_weight.clone()
    layer.bfloat16()
    assert layer.score_weight.dtype == layer.score_bias.dtype == torch.float32
    weights = torch.cat([layer.feature_weight.T, layer.feature_bias[None]]).double()
    assert torch.equal(layer.score_weight, (weights @ layer.condition_weight.double()).float())
    assert not torch.equal(layer.score_weight, before)
    assert not any(name.startswith("score") for name in layer.state_dict())
    monkeypatch.undo()
    assert layer.float().score_weight is None


def test_score_maps_follow_a_loaded_state(monkeypatch) -> None:
    """Also where the layer is a part of what is loaded, and where the tensors are assigned."""
    monkeypatch.setitem(backends.CAPABILITIES["control_cross_attention"], "triton", backends._CPP)

    def made() -> ControlCrossAttention:
        pair, wide = (torch.rand(8), torch.randn(8)), (torch.randn(8, 8), torch.randn(8))
        given = {"condition_norm": pair, "condition": wide, "feature_norm": (torch.rand(4), torch.randn(4))}
        return ControlCrossAttention(fold_projector("linear", **given, feature=(torch.randn(8, 4), torch.randn(8))))

    source = made()
    for assign in (False, True):
        other = torch.nn.ModuleList([made()])
        assert not torch.equal(other[0].score_weight, source.score_weight)
        other.load_state_dict(torch.nn.ModuleList([source]).state_dict(), assign=assign)
        assert torch.equal(other[0].score_weight, source.score_weight)
        assert torch.equal(other[0].score_bias, source.score_bias)
