"""Weights in several precisions: packed on a CPU, each in memory once, and as exact as they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.model.checkpoints import write
from tests.model.inputs import random_image, tiny_config, tiny_state
from vpt_kernels import PackedWeight
from vpt_kernels.backends import EXTENSION_PROBLEM, INTERPRETED
from vpt_model.checkpoint import Checkpoint, random_state
from vpt_model.checkpoint.convert import convert
from vpt_model.checkpoint.weights import Maps, release, stored_tensors
from vpt_model.engine import Engine
from vpt_model.network.model import Model
from vpt_model.network.state import PRECISIONS, State, packed_precision, rounded
from vpt_model.text.tokens import Tokenizer

CPU = torch.device("cpu")
LOOKS = {"clip": "clip", "detection": "dino", "seg": "sam"}
packs = pytest.mark.skipif(EXTENSION_PROBLEM is not None or INTERPRETED, reason="auto packs in neither")


def logits(model: Model, kind: str) -> torch.Tensor:
    engine = Engine(model, Tokenizer.byte_level(model.config.vocab_size, kind), capacity=1024)
    image = random_image(120, 160).numpy()
    answer = engine.ask(image, "What?", looks=[LOOKS[kind]], max_new_tokens=6, keep_logits=True)
    return torch.stack([step.float() for step in answer.logits])


@pytest.mark.parametrize("weights", PRECISIONS[1:])
@pytest.mark.parametrize("kind", LOOKS)
def test_every_part_keeps_its_precision(kind, weights) -> None:
    """The first answer token's logits are float32's over the same rounded weights, up to the rounding of the cache."""
    exact = rounded(tiny_state(kind), weights)
    found = logits(Model.from_state(tiny_config(kind), exact, weights), kind)[0]
    expected = logits(Model.from_state(tiny_config(kind), exact, None), kind)[0]
    plain = logits(Model.from_state(tiny_config(kind), tiny_state(kind), None), kind)[0]
    # w8a8 rounds activations as well, to 8 bits.
    allowed = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01, "int8": 0.05, "int4": 0.05, "w8a8": 0.5}[weights]
    assert (found - expected).abs().max() <= allowed
    if weights != "float32":
        assert (found - plain).abs().max() > 1e-4  # the weights are rounded at all


@packs
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_auto_is_as_stored_and_computes_in_float32(dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in tiny_state("clip").items()}
    model = Model.from_state(tiny_config("clip"), state)
    assert model.language.layers[0].qkv_weight.dtype == dtype and model.vision.blocks[0].fc1[0].dtype == dtype
    assert model.dtype == torch.float32 and model.language.new_cache(8).keys.dtype == dtype
    hidden = model.language.embed(torch.tensor([3, 4]))
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, state["model.embed_tokens.weight"][[3, 4]].float())


@packs
@pytest.mark.parametrize("weights", ("int8", "int4"))
def test_a_tied_head_is_the_embedding(weights) -> None:
    config = replace(tiny_config("clip"), tie_word_embeddings=True)
    model = Model.from_state(config, random_state(config, dtype=torch.bfloat16), weights)
    assert isinstance(model.language.head, PackedWeight) and model.language.embedding is model.language.head


def test_another_precision_than_the_stored_one_is_a_cpus() -> None:
    for weights in ("int8", "int4", "w8a8", "bfloat16"):
        assert packed_precision(weights, torch.float32, CPU) == weights
        with pytest.raises(ValueError, match="on a CPU only"):
            packed_precision(weights, torch.float32, torch.device("cuda"))
    with pytest.raises(ValueError, match="on a CPU only"):
        packed_precision("int8", torch.float64, CPU)
    assert packed_precision("bfloat16", torch.bfloat16, torch.device("cuda")) is None
    assert packed_precision("auto", torch.float64, CPU) is packed_precision(None, torch.float32, CPU) is None
    with pytest.raises(ValueError, match="weights is 'int3'"):
        Model.from_state(tiny_config(), tiny_state(), "int3")


def test_what_is_consumed_is_gone_and_the_rest_is_told() -> None:
    state, told = dict(tiny_state("detection")), []
    total = sum(tensor.nbytes for tensor in state.values())
    Model.from_state(tiny_config("detection"), state, "bfloat16", consume=True, progress=told.append)
    assert told == sorted(told) and 0.8 * total <= told[-1] <= total
    assert not [name for name in state if name.endswith(("_proj.weight", "fc1.weight", "lm_head.weight"))]
    kept = dict(tiny_state("detection"))
    Model.from_state(tiny_config("detection"), kept, "int8")
    assert kept.keys() == tiny_state("detection").keys()


def test_rows_of_several_tensors_are_one_weight() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3.0).view(1, 3)}
    packed = State(state, "float32").weight("a", "b")
    assert torch.equal(packed.dequantize(), torch.tensor([[0, 1, 2], [3, 4, 5], [0, 1, 2.0]]))
    whole = torch.arange(9.0).view(3, 3)
    beside = State({"a": whole[:2], "b": whole[2:]}, None)
    assert beside.weight("a", "b").data_ptr() == whole.data_ptr()


def converted(folder: Path) -> Path:
    """A converted folder of tiny weights."""
    (folder / "source").mkdir()
    state = {name: tensor.bfloat16() for name, tensor in tiny_state("clip").items()}
    return convert(Checkpoint.open(write(folder / "source", state)), folder / "converted")


def test_stored_tensors_are_the_files_own_pages(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    first, second = (Checkpoint.open(folder).load() for _ in range(2))
    # A converted file has side by side what is fused: nothing is read into memory of its own.
    assert len({tensor.untyped_storage().data_ptr() for tensor in first.values()}) == 1
    assert all(torch.equal(first[name], second[name]) for name in first)
    first["model.norm.weight"].zero_()
    assert second["model.norm.weight"].any() and Checkpoint.open(folder).load()["model.norm.weight"].any()
    release(second["lm_head.weight"])
    assert torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    release(torch.ones(4096))


def test_a_mapped_file_that_shrank(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    (file,) = folder.glob("*.safetensors")
    stored = sorted(stored_tensors(folder).values(), key=lambda one: one.offset)
    with file.open("r+b") as opened:
        opened.truncate(stored[-1].offset)
    with pytest.raises(ValueError, match="ended while it was read"):
        Maps().tensor([stored[-1]])
    assert Maps().tensor([stored[0]]) is not None
