"""The layers as the Hugging Face `kernels` library loads and maps them, with its own local loader."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import vpt_kernels
from tests.helpers import assert_same_bits, normal, require
from tests.patch import foreign, published
from vpt_kernels import hub, layers

# The folder tests/kernels, which pytest puts on the path, has no origin.
INSTALLED = getattr(find_spec("kernels"), "origin", None) is not None
require("kernels", None if INSTALLED else "the package `kernels` is not installed; make test-hub installs it")

from kernels import (  # noqa: E402  (only where it is installed)
    LocalLayerRepository,
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)

REPOSITORY = Path(__file__).resolve().parents[2] / "hub"


def kernelized(model: nn.Module, modules: dict[str, type]) -> nn.Module:
    """The model, with the layers of our repository in the place of the given classes."""
    mapping = {}
    for layer, kind in modules.items():
        replace_kernel_forward_from_hub(kind, layer)
        mapping[layer] = {"cpu": LocalLayerRepository(REPOSITORY, layer_name=layer)}
    hub.CALLS.clear()
    with use_kernel_mapping(mapping, inherit_mapping=False):
        return kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)


@pytest.mark.parametrize("kind", foreign.QWEN)
def test_qwen(kind: str) -> None:
    model = foreign.qwen(kind)
    given = foreign.prompt(model, foreign.THREE)
    before = foreign.generate(model, given)[1]
    embed = model.model.visual.patch_embed
    kernelized(embed, {"QwenVLPatchEmbed": type(embed)})
    assert (foreign.generate(model, given)[1] - before).abs().max() < 1e-4
    assert hub.CALLS == {"linear": 1}


@pytest.mark.parametrize("name", ("Dinov2PatchEmbed", "SamPatchEmbed"))
def test_encoders(name: str) -> None:
    model, size = (foreign.dinov2(), 56) if name == "Dinov2PatchEmbed" else (foreign.sam(), 64)
    pixels = normal(2, 3, size, size, key=name)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        kernelized(embed, {name: type(embed)})
        assert (model(pixels).last_hidden_state - before).abs().max() < 1e-4
    assert hub.CALLS == {"linear": 1}


@pytest.mark.parametrize("kind", published.PROJECTORS)
def test_projectors(kind: str) -> None:
    projector = foreign.filled(published.PROJECTORS[kind]())
    shape = {"detection": (3, 5, 48), "seg": (3, 16, 8, 8), "clip": (11, published.HIDDEN)}[kind]
    features, control = normal(*shape, key=kind), normal(3, published.HIDDEN, key="control")
    options = {"grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6], [1, 2, 2]])} if kind == "clip" else {}
    with torch.no_grad():
        before, plain = projector(features, control, **options)[0], projector(features)[0]
        kernelized(projector, {type(projector).__name__: type(projector)})
        scale = before.abs().max()
        assert (projector(features, control, **options)[0] - before).abs().max() < 1e-5 * scale
        assert (projector(features)[0] - plain).abs().max() < 1e-5 * scale
        with pytest.raises(ValueError, match="has no intermediates"):
            projector(features, control, True, **options)
    assert hub.CALLS == {"control_cross_attention": 1 if kind == "clip" else 2}


def test_nothing_is_replaced_where_nothing_is_mapped() -> None:
    """What the counter is for: `kernelize` succeeds and says nothing."""
    model = foreign.dinov2()
    pixels = normal(1, 3, 56, 56, key="unmapped")
    hub.CALLS.clear()
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        with use_kernel_mapping({}, inherit_mapping=False):
            model = kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert_same_bits(model(pixels).last_hidden_state, before)
    assert not hub.CALLS


def test_the_repository_lists_every_layer() -> None:
    metadata = json.loads((REPOSITORY / "build/torch-universal/metadata.json").read_text())
    assert metadata["license"] == "Apache-2.0" and metadata["version"] == 0
    for name in hub.__all__:
        assert LocalLayerRepository(REPOSITORY, layer_name=name).load() is getattr(hub, name)


def test_loading_takes_no_packages_place() -> None:
    """The loader imports the repository under its id: as "vpt_kernels" it would be found instead of the package."""
    LocalLayerRepository(REPOSITORY, layer_name="QwenVLPatchEmbed").load()
    assert sys.modules["vpt_kernels"] is vpt_kernels and sys.modules["vpt_kernels.layers"] is layers
