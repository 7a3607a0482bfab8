"""The modules give what the functions give, and survive .to()."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from vpt_kernels import (
    append_visual_kv,
    backends,
    control_cross_attention,
    fold_projector,
    layers,
    qwen2_vl_policy,
    rotary_table,
)
from vpt_kernels.control_cross_attention.api import ControlProjector, scored
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


def projecting(form: str = "linear", dtype: torch.dtype = torch.float32) -> ControlCrossAttention:
    """A layer of its own weights, 4 channels to 8."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    given = {"condition_norm": (draw(8), draw(8)), "condition": (draw(8, 8), draw(8))}
    if form != "identity":
        feature = (draw(8, 4, 4, 4) if form == "conv" else draw(8, 4), draw(8))
        given |= {"feature_norm": (draw(4), draw(4)), "feature": feature}
    return ControlCrossAttention(fold_projector(form, **given))


def features_of(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = {"linear": (3, 5, 4), "conv": (3, 4, 8, 8), "identity": (3, 5, 8)}[form]
    return torch.randn(shape, generator=generator), torch.randn(3, 8, generator=generator)


class Doubled(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.factor * weight


def stepped(layer: ControlCrossAttention) -> None:
    with torch.enable_grad():
        layer.condition_weight = nn.Parameter(layer.condition_weight)
        layer.condition_weight.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def parametrised(layer: ControlCrossAttention) -> None:
    nn.utils.parametrize.register_parametrization(layer, "condition_weight", Doubled())
    _ = layer(*features_of("linear"))
    layer.parametrizations.condition_weight[0].factor.mul_(2)


def offloaded(layer: ControlCrossAttention) -> None:
    """As hooks that load a layer's weights for its call, and then other ones, at another address."""
    held = {name: 2 * weight for name, weight in layer.named_buffers()}
    layer.to("meta")
    for name, weight in held.items():
        setattr(layer, name, weight)


def by_data(layer: ControlCrossAttention) -> None:
    layer.condition_bias.data.mul_(2)
    layer.to("cpu")


CHANGES: dict[str, Callable[[ControlCrossAttention], object]] = {
    "mul_": lambda layer: layer.condition_weight.mul_(2),
    "copy_": lambda layer: layer.feature_bias.copy_(torch.ones(8)),
    "a row": lambda layer: layer.feature_weight[3:4].zero_(),
    "replaced": lambda layer: setattr(layer, "condition_bias", torch.ones(8)),
    "data replaced": lambda layer: setattr(layer.condition_weight, "data", torch.ones(8, 8)),
    "load": lambda layer: layer.load_state_dict({n: 2 * w for n, w in layer.state_dict().items()}),
    "assigned": lambda layer: layer.load_state_dict({n: 2 * w for n, w in layer.state_dict().items()}, assign=True),
    "dtype": lambda layer: layer.bfloat16().float(),
    "empty": lambda layer: [weight.fill_(0.5) for weight in layer.to_empty(device="cpu").buffers()],
    "optimiser": stepped,
    "parametrisation": parametrised,
    "offloading": offloaded,
    "data": by_data,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_folded_follows_every_change(change: str, monkeypatch) -> None:
    """What the operator is given are the weights of now, and the maps that are folded from just those."""
    monkeypatch.setitem(backends.CAPABILITIES["control_cross_attention"], "triton", backends._CPP)
    given: list[ControlProjector] = []

    def operator(features, control, projector, cu_seqlens):
        given.append(projector)
        return features

    layer = projecting()
    monkeypatch.setattr(layers, "control_cross_attention", operator)
    layer(*features_of("linear"))
    CHANGES[change](layer)
    # Torch refuses to copy what is parametrised.
    for made in [layer] if nn.utils.parametrize.is_parametrized(layer) else [layer, copy(layer), deepcopy(layer)]:
        made(*features_of("linear"))
        want = scored(ControlProjector(*(getattr(layer, name) for name in list(ControlProjector.__annotations__)[:8])))
        for found, expected in zip(given[-1].tensors(), want.tensors()):
            assert torch.equal(found, expected)
    maps = [torch.cat([found.score_weight, found.score_bias[:, None]], 1) for found in (given[0], given[-1])]
    assert not torch.equal(*maps)


@torch.no_grad()
def test_what_is_folded_is_folded_once(monkeypatch) -> None:
    monkeypatch.setitem(backends.CAPABILITIES["control_cross_attention"], "triton", backends._CPP)
    layer = projecting()
    first = layer.projector
    assert layer.projector.score_weight is first.score_weight
    layer.condition_weight.mul_(2)
    assert layer.projector.score_weight is not first.score_weight


@pytest.mark.parametrize("form", ("linear", "conv", "identity"))
@torch.no_grad()
def test_a_layer_has_weights_of_its_own(form: str) -> None:
    """Of a convolution some were copies and some aliases: the layer was neither the old nor the new module."""
    source = projecting(form)
    layer, given = ControlCrossAttention(source.projector), features_of(form)
    want = layer(*given)
    for weight in source.buffers():
        weight.mul_(3)
    assert torch.equal(layer(*given), want) and not torch.equal(source(*given), want)


@torch.no_grad()
def test_a_transposed_weight_is_the_weight() -> None:
    layer, given = projecting(), features_of("linear")
    want = layer(*given)
    layer.load_state_dict({"condition_weight": layer.condition_weight.T.contiguous().T}, assign=True, strict=False)
    assert not layer.condition_weight.is_contiguous() and torch.equal(layer(*given), want)


@pytest.mark.parametrize("name", ("feature_weight", "feature_norm_bias", "condition_norm_weight"))
@pytest.mark.parametrize("change", (lambda t: t.to("meta"), lambda t: t.bfloat16()), ids=("meta", "bfloat16"))
@torch.no_grad()
def test_weights_apart_are_refused_in_words(name: str, change: Callable) -> None:
    """One weight offloaded or converted: no result on meta, and no message of the inside."""
    layer, given = projecting(), features_of("linear")
    layer(*given)
    setattr(layer, name, change(getattr(layer, name)))
    with pytest.raises(ValueError, match="several dtypes or devices.*convert them to one"):
        layer(*given)
