"""DINOv2's tensors under the names of each version of transformers, in the state dict and in the module."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.model.checkpoints import fields, write
from tests.model.inputs import random_image, tiny_config
from vpt_model.checkpoint import Checkpoint, random_state
from vpt_model.checkpoint.encoder_names import state_for
from vpt_model.config import ModelConfig
from vpt_model.network.model import Model
from vpt_model.published.encoders import reencoder

# Of transformers 5.17 and, behind it, of 5.18 and later.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_out": "mlp.down_proj",
}
PREFIX = "detection_model."
each_layer = pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
each_version = pytest.mark.parametrize("later", [False, True], ids=["5.17", "5.18"])


def config(gated: bool) -> ModelConfig:
    tiny = tiny_config("detection")
    return replace(tiny, dino=replace(tiny.dino, use_swiglu_ffn=gated))


def written(state: dict[str, torch.Tensor], later: bool) -> dict[str, torch.Tensor]:
    """`state` as a file has it that one of the two versions has written, independently of what is tested."""
    old_of = {new: old for old, new in RENAMED.items()}
    names, found = RENAMED if later else old_of, {}
    for name, tensor in state.items():
        for own, other in names.items():
            name = re.sub(rf"^({PREFIX}.*layer\.\d+\.){re.escape(own)}", rf"\g<1>{other}", name)
        if not later and name.startswith(PREFIX) and "mlp.gate_proj" in name:
            up = state[name.replace("gate_proj", "up_proj")]
            found[name.replace("mlp.gate_proj", "mlp.weights_in")] = torch.cat([tensor, up])
        elif later or not (name.startswith(PREFIX) and "mlp.up_proj" in name):
            found[name] = tensor
    return found


def test_both_forms_differ():
    state = random_state(config(True))
    old, new = written(state, False), written(state, True)
    assert "detection_model.encoder.layer.0.mlp.weights_in.weight" in old.keys() - new.keys()
    assert "detection_model.encoder.layer.1.attention.q_proj.bias" in new.keys() - old.keys()


@each_layer
@each_version
def test_a_folder_of_either_version_opens(tmp_path: Path, gated: bool, later: bool) -> None:
    state = random_state(config(gated))
    content = fields(config(gated), vision_encoder_ls=["dino"])
    checkpoint = Checkpoint.open(write(tmp_path, written(state, later), content))
    assert checkpoint.config.dino.use_swiglu_ffn is gated
    loaded = checkpoint.load()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    state = written(random_state(config(False)), False)
    name = "detection_model.encoder.layer.0.attention.attention.query.bias"
    state[name.replace("attention.query", "q_proj")] = state[name]
    with pytest.raises(ValueError, match=r"both .*q_proj\.bias and .*attention\.query\.bias"):
        Checkpoint.open(write(tmp_path, state, fields(config(False), vision_encoder_ls=["dino"])))


def test_a_flag_must_be_one(tmp_path: Path) -> None:
    content = fields(config(False), vision_encoder_ls=["dino"])
    content["dinov2"]["use_swiglu_ffn"] = 1
    with pytest.raises(ValueError, match="use_swiglu_ffn.*1"):
        Checkpoint.open(write(tmp_path, random_state(config(False)), content))


@each_layer
@each_version
def test_the_installed_module_takes_either(gated: bool, later: bool) -> None:
    """Both ways: a state of one version in the module of the other; the encoder's output equals the procedure's."""
    state = random_state(config(gated))
    model, published = Model.from_state(config(gated), state), reencoder(config(gated), state)
    theirs = {k.removeprefix(PREFIX): v for k, v in written(state, later).items() if k.startswith(PREFIX)}
    model.encoder.load(theirs)
    image = random_image(150, 230)
    with torch.inference_mode():
        found = model.encoder(model.encoder.embed_regions([image], [(0, 0, 0, 230, 150)]))
        expected = published(published.pixel_values([Image.fromarray(image.numpy())]))
    assert (found - expected).abs().max() <= 1e-4 and expected.std() > 0.5


class Encoder(nn.Module):
    """The names that matter, of either version."""

    def __init__(self, later: bool) -> None:
        super().__init__()
        layer = nn.ModuleDict({"attention": nn.Module(), "mlp": nn.Module()})
        if later:
            layer["attention"].q_proj = nn.Linear(4, 4)
            layer["mlp"].gate_proj, layer["mlp"].up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
        else:
            layer["attention"].attention = nn.ModuleDict({"query": nn.Linear(4, 4)})
            layer["mlp"].weights_in = nn.Linear(4, 16)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([layer])})


@pytest.mark.parametrize("module_is_later", [False, True])
@each_version
def test_modules_of_either_version(module_is_later: bool, later: bool) -> None:
    """The one that is not installed too, by modules with its names; only packing copies."""
    state, module = Encoder(later).state_dict(), Encoder(module_is_later)
    loaded = state_for(module, state)
    module.load_state_dict(loaded, strict=True)
    again = state_for(Encoder(later), module.state_dict())
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    shared = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    copied = [name for name, tensor in loaded.items() if tensor.untyped_storage().data_ptr() not in shared]
    assert all("weights_in" in name for name in copied) and bool(copied) == (not module_is_later)
    surplus = state_for(module, state | {"surplus": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="surplus"):
        module.load_state_dict(surplus, strict=True)


def test_names_of_other_models_are_left_alone() -> None:
    """The language model has a q_proj and a gate_proj of its own."""
    state = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(1), "visual.mlp.weights_in.bias": torch.zeros(2)}
    assert state_for(nn.Identity(), state).keys() == state.keys()
