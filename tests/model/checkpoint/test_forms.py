"""A plain model in every form in which transformers writes it loads and gives transformers' own logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from typer.testing import CliRunner

from tests.model.checkpoints import EMBEDDING, HEAD, fields, write, write_weights
from tests.model.inputs import tiny_config
from vpt_model.app.cli import app
from vpt_model.checkpoint import Checkpoint, load_checkpoint, random_state
from vpt_model.checkpoint.convert import convert
from vpt_model.config import parse_config
from vpt_model.network.model import Model

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3e5, "mrope_section": [4, 6, 6]},
}
VISION = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 128}
IDS = torch.arange(3, 40, 3)


def theirs(tied: bool, dtype: torch.dtype = torch.float32) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(3)
    config = Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=tied)
    return Qwen2VLForConditionalGeneration(config).eval().to(dtype)


def logits(folder: Path) -> Tensor:
    """Ours, of a fixed text."""
    config, state = load_checkpoint(folder, torch.float32)
    model = Model.from_state(config, state)
    with torch.inference_mode():
        embeds, positions = model.language.embed(IDS), torch.arange(len(IDS)).expand(3, -1)
        hidden = model.language.forward(embeds, positions, [model.language.new_cache(len(IDS))], [len(IDS)])
        return model.language.logits(hidden)


@pytest.mark.parametrize("original", [True, False], ids=["names as published", "names since 4.52"])
@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_what_save_pretrained_writes_gives_its_logits(tmp_path: Path, original: bool, shards: int, tied: bool) -> None:
    model = theirs(tied)
    size = "10GB" if shards == 1 else "400KB"
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size=size)
    files = [*tmp_path.glob("*.safetensors")]
    assert (len(files) == 1) == (shards == 1)
    names = {name for file in files for name in load_file(file)}
    assert any(name.startswith("model.language_model.") for name in names) != original
    assert (HEAD in names) != tied
    content = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in content and content["text_config"]["rope_parameters"]["rope_theta"] == 3e5
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(tmp_path), expected, atol=1e-5, rtol=1e-5)
    again = convert(Checkpoint.open(tmp_path), tmp_path / "converted")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)


def as_of(version: str) -> dict[str, Any]:
    """`config.json` of the tiny plain model as versions of transformers write it."""
    old = fields(tiny_config(None))
    beside = ("model_type", "vision_config", "tie_word_embeddings", "image_resolution", "dinov2", "sam_vision")
    moved = {name: old[name] for name in old if name not in beside}
    scaling = {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}
    kept = {name: old[name] for name in beside if name in old}
    parameters = {"rope_type": "default", "rope_theta": moved["rope_theta"], "mrope_section": [4, 6, 6]}
    new = {name: value for name, value in moved.items() if name not in ("rope_theta", "rope_scaling")}
    return {
        "4.45": old | {"torch_dtype": "float32", "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        "4.50": old | {"torch_dtype": "float32", "rope_scaling": scaling},
        "4.52": old | {"torch_dtype": "float32", "text_config": moved | {"rope_scaling": scaling, "dtype": "float32"}},
        "4.57": kept | {"dtype": "float32", "text_config": moved | {"rope_scaling": scaling}},
        "5": kept | {"dtype": "float32", "text_config": new | {"rope_parameters": parameters}},
        "5, flat": kept | new | {"dtype": "float32", "rope_parameters": parameters},
    }[version]


@pytest.mark.parametrize("version", ["4.45", "4.50", "4.52", "4.57", "5", "5, flat"])
def test_configurations_of_every_version_say_the_same(tmp_path: Path, version: str) -> None:
    config, state = tiny_config(None), random_state(tiny_config(None))
    found, loaded = load_checkpoint(write(tmp_path, state, as_of(version)))
    assert found == config and all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_text_config_wins_over_what_stands_beside_it() -> None:
    """Transformers reads the section; a tool that resized one of the two left the other behind."""
    content = as_of("4.52")
    assert parse_config(content | {"vocab_size": 7, "rope_theta": 1.0}) == tiny_config(None)
    assert parse_config(as_of("5") | {"rope_parameters": {"rope_theta": 1.0}}) == tiny_config(None)


@pytest.mark.parametrize("prefixes", [{"model.": "model.language_model.", "visual.": "model.visual."}, {}])
@pytest.mark.parametrize("pickled", [False, True])
def test_names_of_a_variant_of_either_generation(tmp_path: Path, prefixes: dict[str, str], pickled: bool) -> None:
    state = random_state(tiny_config())

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)

    write(tmp_path, {renamed(name): tensor for name, tensor in state.items()}, shards=3, pickled=pickled)
    loaded = load_checkpoint(tmp_path)[1]
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
def test_a_tied_matrix_may_be_stored_under_either_name(tmp_path: Path, kept: str) -> None:
    config = replace(tiny_config(), tie_word_embeddings=True)
    state = random_state(config)
    dropped = {EMBEDDING, HEAD} - {kept}
    write(tmp_path, {name: tensor for name, tensor in state.items() if name not in dropped}, fields(config))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.head == "tied, stored once"
    loaded = checkpoint.load()
    assert torch.equal(loaded[HEAD], state[EMBEDDING]) and torch.equal(loaded[EMBEDDING], state[EMBEDDING])


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_conversion_declares_its_dtype_under_the_name_that_was_there(tmp_path: Path, name: str) -> None:
    content = as_of("5") | {"dtype": None, name: "float32"}
    content["text_config"] = content["text_config"] | {name: "float32"}
    write(tmp_path, random_state(tiny_config(None)), {k: v for k, v in content.items() if v is not None})
    folder = convert(Checkpoint.open(tmp_path), tmp_path / "out", torch.bfloat16)
    written = json.loads((folder / "config.json").read_text())
    assert written[name] == written["text_config"][name] == "bfloat16"
    assert {"torch_dtype", "dtype"} & written.keys() == {name}
    assert next(iter(load_checkpoint(folder)[1].values())).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config": [1]}, ["config.json", "text_config", "download"]),
        ({"rope_parameters": 7}, ["config.json", "rope_parameters", "download"]),
        ({"layer_types": ["sliding_attention"]}, ["config.json", "layer_types", "sliding_attention"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["config.json", "quantization_config", "awq"]),
        ({"model_type": "qwen2_5_vl"}, ["config.json", "model_type 'qwen2_5_vl'", "qwen2_vl_vpt", "checkpoint"]),
        ({"layer_types": 3}, ["config.json", "layer_types", "full attention"]),
        ({"tie_word_embeddings": False}, ["missing lm_head.weight", "set tie_word_embeddings in config.json"]),
    ],
)
def test_what_does_not_load_says_file_field_and_remedy(tmp_path: Path, change: dict, named: list[str]) -> None:
    state = {name: tensor for name, tensor in random_state(tiny_config(None)).items() if name != HEAD}
    write(tmp_path, state, as_of("5") | {"tie_word_embeddings": True})
    Checkpoint.open(tmp_path)
    write(tmp_path, state, as_of("5") | {"tie_word_embeddings": True} | change)
    with pytest.raises(ValueError) as raised:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(raised.value) and all(text in str(raised.value) for text in named), raised.value


def test_fields_that_are_null_are_as_if_they_were_absent(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": None, "rope_type": None, "mrope_section": [4, 6, 6]}}
    absent = fields() | rope
    null = absent | dict.fromkeys(("image_resolution", "layer_types", "text_config", "rope_parameters", "dinov2"))
    names = ["clip_projector.linear_condition.weight"]
    for name in null:
        absent.pop(name) if null[name] is None and name in absent else None
    assert parse_config(null, names) == parse_config(absent, names)


def test_files_that_macos_puts_beside_others_are_no_weights(tmp_path: Path) -> None:
    state = random_state(tiny_config())
    write(tmp_path, state, fields())
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert Checkpoint.open(tmp_path).tensors.keys() == state.keys()


def test_a_file_of_another_model_is_one_readable_line(tmp_path: Path) -> None:
    write(tmp_path, random_state(tiny_config(None)), as_of("5"))
    (tmp_path / "model.safetensors").unlink()
    write_weights(tmp_path, {f"transformer.h.{i}.weight": torch.zeros(2) for i in range(3000)})
    result = CliRunner().invoke(app, ["ask", "--model", str(tmp_path), "--image", __file__, "--question", "?"])
    assert result.exit_code == 2
    arguments = ["convert", str(tmp_path), str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and len(result.stderr) < 3000
    for text in ("and 2990 more", "unexpected transformer.h.0.weight", "config.json and the weights of one checkpoint"):
        assert text in result.stderr
