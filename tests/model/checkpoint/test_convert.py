"""`vpt convert`: the same model from fused safetensors, and nothing that loads after anything went wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.model.checkpoints import EMBEDDING, HEAD, VARIANTS, byte_level, fields, write, write_variant
from tests.model.inputs import tiny_config
from vpt_model import Model
from vpt_model.app.cli import app
from vpt_model.checkpoint import convert, load_checkpoint, random_state
from vpt_model.checkpoint.load import Checkpoint
from vpt_model.checkpoint.shapes import fused_groups
from vpt_model.config import ENCODERS

ROOT = Path(__file__).resolve().parents[3]


def vpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_converted_weights_are_the_same(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    config, state = write_variant(source, name)
    result = vpt("convert", source, target)
    assert result.exit_code == 0, result.output
    converted = Checkpoint.open(target)
    assert converted.config == config
    assert same(converted.load(), state)
    assert converted.tokenizer().ids == Checkpoint.open(source).tokenizer().ids
    stored = load_file(target / "model.safetensors")
    assert stored.keys() == fused_groups(config).keys()
    layer = "model.layers.1.self_attn."
    expected = torch.cat([state[f"{layer}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(stored[f"{layer}qkv_proj.weight"], expected)
    assert f"{layer}q_proj.weight" not in stored and "model.layers.0.mlp.gate_up_proj.weight" in stored
    assert (HEAD in stored) == (not config.tie_word_embeddings)
    content = json.loads((target / "config.json").read_text())
    assert [ENCODERS[encoder] for encoder in content["vision_encoder_ls"]] == [config.kind]


def test_shards_and_types(tmp_path: Path) -> None:
    config, state = write_variant(tmp_path / "source", "Qwen2-VL-7b-VPT-CLIP")
    checkpoint, steps = Checkpoint.open(tmp_path / "source"), []
    limit = 300_000
    convert.convert(
        checkpoint,
        tmp_path / "target",
        torch.float32,
        limit,
        progress=lambda done, total: steps.append((done, total)),
    )
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(files) > 5
    for path in files:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]
        assert sum(sizes) <= limit or len(sizes) == 1
    index = json.loads((tmp_path / "target/model.safetensors.index.json").read_text())
    total = index["metadata"]["total_size"]
    assert total == sum(tensor.numel() * 4 for tensor in state.values())
    assert steps[-1] == (total, total) and [done for done, _ in steps] == sorted({done for done, _ in steps})
    found = Checkpoint.open(tmp_path / "target")
    assert found.config == config and same(found.load(), {name: tensor.float() for name, tensor in state.items()})


def test_a_plain_model_stays_plain(tmp_path: Path) -> None:
    config = tiny_config(None)
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", random_state(config), fields(config))
    convert.convert(Checkpoint.open(tmp_path / "source"), tmp_path / "target")
    assert load_checkpoint(tmp_path / "target")[0] == config
    assert "vision_encoder_ls" not in json.loads((tmp_path / "target/config.json").read_text())


def test_where_head_and_embedding_differ_the_head_is_kept(tmp_path: Path) -> None:
    config = replace(tiny_config(), tie_word_embeddings=True)
    state = random_state(config)
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", state | {HEAD: state[HEAD] + 1}, fields(config))
    checkpoint = Checkpoint.open(tmp_path / "source")
    assert checkpoint.head == "tied, stored twice, not equal" and "is used for both" in checkpoint.notices[0]
    convert.convert(checkpoint, tmp_path / "target")
    assert torch.equal(load_checkpoint(tmp_path / "target")[1][EMBEDDING], state[HEAD] + 1)


def test_loaded_weights_are_fused_without_a_copy(tmp_path: Path) -> None:
    write_variant(tmp_path / "source", "Qwen2-VL-2b-VPT-CLIP")
    checkpoint = Checkpoint.open(tmp_path / "source")
    config, state = checkpoint.config, checkpoint.load()
    layer = Model.from_state(config, state, None).language.layers[0]
    assert layer.qkv_weight.data_ptr() == state["model.layers.0.self_attn.q_proj.weight"].data_ptr()
    assert layer.gate_up_weight.data_ptr() == state["model.layers.0.mlp.gate_proj.weight"].data_ptr()
    # The same numbers that are not adjacent are copied.
    copied = {name: tensor.clone() for name, tensor in state.items()}
    apart = Model.from_state(config, copied, None).language.layers[0]
    assert torch.equal(apart.qkv_weight, layer.qkv_weight) and torch.equal(apart.qkv_bias, layer.qkv_bias)
    assert torch.equal(apart.gate_up_weight, layer.gate_up_weight)


def test_fused_tensor_of_the_wrong_height(tmp_path: Path) -> None:
    write_variant(tmp_path / "source", "Qwen2-VL-2b-VPT-CLIP")
    convert.convert(Checkpoint.open(tmp_path / "source"), tmp_path / "target")
    file, name = tmp_path / "target/model.safetensors", "model.layers.0.mlp.gate_up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    with pytest.raises(ValueError, match="3 problems") as error:
        Checkpoint.open(tmp_path / "target")
    assert f"unexpected {name} [511, 128]" in str(error.value)
    assert "missing model.layers.0.mlp.up_proj.weight [256, 128]" in str(error.value)


@pytest.mark.parametrize("failure", ["exception", "interrupt", "full disk"])
def test_a_failed_conversion_leaves_nothing(tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_variant(tmp_path / "source", "Qwen2-VL-2b-VPT-CLIP")
    checkpoint = Checkpoint.open(tmp_path / "source")

    def fail(done: int, total: int) -> None:
        if done > total / 2:
            assert list(tmp_path.glob("target*/*.safetensors"))
            raise {"exception": RuntimeError, "interrupt": KeyboardInterrupt, "full disk": OSError}[failure]

    with pytest.raises((RuntimeError, KeyboardInterrupt, OSError)):
        convert.convert(checkpoint, tmp_path / "target", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    usage = convert.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="1,000 bytes free"):
        convert.convert(checkpoint, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


_SLOW = """
import sys, time
from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.convert import convert

def slow(done, total):
    print(done, flush=True)
    if done > total / 2:
        time.sleep(60)

convert(Checkpoint.open(sys.argv[1]), sys.argv[2], progress=slow)
"""


def test_a_killed_conversion_does_not_load(tmp_path: Path) -> None:
    write_variant(tmp_path / "source", "Qwen2-VL-2b-VPT-CLIP")
    arguments = [sys.executable, "-c", _SLOW, str(tmp_path / "source"), str(tmp_path / "target")]
    child = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE)
    partial = tmp_path / "target.incomplete"
    deadline = time.monotonic() + 60
    while not any(partial.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert partial.is_dir() and not (tmp_path / "target").exists()
    with pytest.raises(ValueError, match="config.json' does not exist"):
        Checkpoint.open(partial)
    with pytest.raises(ValueError, match="remove it if none is running"):
        convert.convert(Checkpoint.open(tmp_path / "source"), tmp_path / "target")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source", "source"], "exists: choose a new folder"),
        (["source", "no/such/folder"], "there is no folder"),
        (["source", "target", "--dtype", "int8"], "--dtype int8"),
        (["nowhere", "target"], "there is no folder nowhere"),
        (["empty", "target"], "config.json' does not exist"),
    ],
)
def test_bad_input_ends_with_one_line(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_variant(tmp_path / "source", "Qwen2-VL-2b-VPT-CLIP")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = vpt("convert", *arguments)
    assert result.exit_code == 2 and not result.stdout
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]


def test_a_checkpoint_with_a_foreign_tokenizer_is_not_converted(tmp_path: Path) -> None:
    write_variant(tmp_path / "source", "Qwen2-VL-2b-VPT-CLIP")
    byte_level(tiny_config("seg"))._backend.save(str(tmp_path / "source/tokenizer.json"))
    result = vpt("convert", tmp_path / "source", tmp_path / "target")
    assert result.exit_code == 2 and "lacks <|clip_image_pad|>" in result.stderr
    assert os.listdir(tmp_path) == ["source"]
