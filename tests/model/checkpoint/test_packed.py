"""`vpt convert --weights`: folders whose products' weights are stored packed, and whatever may be wrong with them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.model.checkpoints import EMBEDDING, HEAD, VARIANTS, write_variant
from tests.model.inputs import random_image, tiny_config
from vpt_kernels import PackedWeight, pack_weight
from vpt_model import Engine, Model
from vpt_model.app.cli import app
from vpt_model.app.page.command import make_answerer
from vpt_model.checkpoint import convert, load_checkpoint, packed, random_state
from vpt_model.checkpoint.load import Checkpoint, check_state, moved
from vpt_model.checkpoint.shapes import fused_groups
from vpt_model.network import state as network_state
from vpt_model.network.state import PRECISIONS, rounded

ROOT = Path(__file__).resolve().parents[3]
CLIP = "Qwen2-VL-2b-VPT-CLIP"
CPU = torch.device("cpu")
QKV = "model.layers.0.self_attn.qkv_proj.weight"


def vpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder packed in int8, and `source` beside it."""
    write_variant(tmp_path / "source", CLIP)
    return convert.convert(Checkpoint.open(tmp_path / "source"), tmp_path / "target", weights="int8")


def answers(model: Model, folder: Path, look: str) -> tuple[list[int], torch.Tensor]:
    engine = Engine(model, Checkpoint.open(folder).tokenizer(), capacity=1024)
    answer = engine.ask(random_image(120, 160), "What?", looks=[look], max_new_tokens=4, keep_logits=True)
    return answer.ids, answer.logits


@pytest.mark.parametrize("weights", PRECISIONS[1:])
@pytest.mark.parametrize("name", [CLIP, "Qwen2-VL-2b-VPT-Det", "Qwen2-VL-2b-VPT-Seg", "Qwen2-VL-7b-VPT-CLIP"])
def test_a_packed_folder_is_the_same_model(tmp_path: Path, name: str, weights: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    config, state = write_variant(source, name)
    assert vpt("convert", source, target, "--weights", weights).exit_code == 0
    checkpoint = Checkpoint.open(target)
    assert checkpoint.config == config and checkpoint.weights == weights
    assert checkpoint.head == ("tied, stored once" if config.tie_word_embeddings else "untied")
    look = {"clip": "clip", "detection": "dino", "seg": "sam"}[VARIANTS[name].kind]
    expected = answers(Model.from_state(config, state, weights), source, look)
    for asked in ("auto", weights):
        model = Model.from_state(config, checkpoint.load(), asked, consume=True)
        found = answers(model, target, look)
        assert found[0] == expected[0] and torch.equal(found[1], expected[1])
        assert (model.language.embedding is model.language.head) == config.tie_word_embeddings


def test_nothing_but_the_patch_embedding_is_packed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    monkeypatch.setattr(
        network_state, "pack_weight", lambda parts, *rest, **other: again.append(parts) or pack_weight(parts, *rest)
    )
    told: list[int] = []
    state = load_checkpoint(folder)[1]
    total = sum(one.nbytes for one in state.values())
    Model.from_state(tiny_tied(), state, consume=True, progress=told.append)
    assert [tuple(part.shape) for parts in again for part in parts] == [(64, 1176)]
    assert told == sorted(told) and 0.9 * total <= told[-1] <= total
    assert not [name for name, one in state.items() if isinstance(one, PackedWeight)]


def tiny_tied():
    return replace(tiny_config(), tie_word_embeddings=True)


def test_packed_weights_are_the_files_own_pages(folder: Path) -> None:
    state = load_checkpoint(folder)[1]
    weights = {name: one for name, one in state.items() if isinstance(one, PackedWeight)}
    assert weights.keys() - {HEAD} == packed.products(tiny_tied()).keys() and weights[HEAD] is weights[EMBEDDING]
    parts = [one for name, weight in weights.items() for one in packed.tensors_of(name, weight).values()]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert {part.data_ptr() % 64 for part in parts} == {0}
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored[f"{QKV}.data"], weights[QKV].data) and stored[f"{QKV}.scales"].dtype == torch.float32
    assert "model.layers.0.self_attn.qkv_proj.bias" in stored and QKV not in stored


def test_numbers_of_a_packed_folder(folder: Path) -> None:
    """With a dtype there are no packed weights, but the numbers that they hold, under the published names."""
    config, original = load_checkpoint(folder.parent / "source")
    found = load_checkpoint(folder, torch.float32)[1]
    expected = rounded({name: tensor.float() for name, tensor in original.items()}, "int8")
    assert found.keys() == expected.keys() and found[HEAD] is found[EMBEDDING]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    check_state(config, found)


def test_files_that_are_not_aligned_and_shards(tmp_path: Path, folder: Path) -> None:
    """Another tool may write the same tensors anywhere: they are read, and the model is the same."""
    expected = load_checkpoint(folder)[1]
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    raw = (folder / "model-0.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    (folder / "model-0.safetensors").write_bytes(
        (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    )
    found = load_checkpoint(folder)[1]
    for name, one in expected.items():
        if isinstance(one, PackedWeight):
            assert torch.equal(one.dequantize(), found[name].dequantize())
    steps: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(tmp_path / "source")
    convert.convert(checkpoint, tmp_path / "shards", None, 100_000, lambda *told: steps.append(told), weights="int8")
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and steps[-1][0] == steps[-1][1] == sum(
        tensor.nbytes for path in files for tensor in load_file(path).values()
    )
    again = load_checkpoint(tmp_path / "shards")[1]
    assert all(torch.equal(again[name].data, expected[name].data) for name in (QKV, EMBEDDING))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{QKV}.scales"), f"missing {QKV}.scales [16, 1, 16]"),
        (lambda tensors: tensors.pop(f"{QKV}.data"), f"missing {QKV}.data [16, 64, 32]"),
        (lambda tensors: tensors.pop("model.norm.weight"), "missing model.norm.weight [128]"),
        (lambda tensors: tensors.update({f"{QKV}.data": tensors[f"{QKV}.data"][:-1]}), f"misshapen {QKV}.data [15, 64"),
        (lambda tensors: tensors.update({f"{QKV}.data": tensors[f"{QKV}.data"].view(torch.uint8)}), "is torch.uint8"),
        (lambda tensors: tensors.update({f"{QKV}.minima": torch.ones(3)}), f"unexpected {QKV}.minima [3]"),
        (lambda tensors: tensors.update({QKV: torch.ones(256, 128).bfloat16()}), "unexpected model.layers.0"),
        (lambda tensors: tensors.update({HEAD: torch.ones(2, 2).bfloat16()}), f"unexpected {HEAD} [2, 2]"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(128)}), "must share one floating dtype"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change, message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Checkpoint.open(folder)
    assert message in str(error.value) and "problems between the tensors" in str(error.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"layout": 2}, "layout 2 in 'int8', and this version reads layout 1: convert the checkpoint"),
        ({"layout": None}, "layout None"),
        ({"weights": None}, "in None"),
        ({"weights": "int3"}, "dtype is 'int3'"),
        ({"weights": "bfloat16"}, "problems between the tensors"),
        ({"quant_method": "gptq"}, "weights that are not quantised are"),
        (None, "problems between the tensors"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, said, message: str) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    field = content.pop("quantization_config")
    path.write_text(json.dumps(content | ({} if said is None else {"quantization_config": field | said})))
    with pytest.raises(ValueError) as error:
        Checkpoint.open(folder)
    assert message in str(error.value)


def test_a_configuration_that_claims_too_much_costs_nothing(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 90_000_000}))
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="a product has 90,000,000 columns; packed weights have at most 1,048,576"):
        Checkpoint.open(folder)
    assert time.perf_counter() - begin < 5


def test_a_file_that_is_cut_short(folder: Path) -> None:
    """Before it is opened it is refused; while it is read, too."""
    checkpoint = Checkpoint.open(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        Checkpoint.open(folder)
    with pytest.raises(ValueError, match="ended while it was read"):
        checkpoint.load()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", None])
def test_another_precision_is_refused(folder: Path, weights: str | None) -> None:
    config, state = load_checkpoint(folder)
    with pytest.raises(ValueError, match="these are stored packed in int8: use 'auto', or the checkpoint that they"):
        Model.from_state(config, state, weights)


def test_commands_on_a_packed_folder(tmp_path: Path, folder: Path) -> None:
    Image.fromarray(random_image(60, 80).numpy()).save(tmp_path / "photo.png")
    arguments = ["ask", "--model", folder, "--image", tmp_path / "photo.png", "--question", "What?", "--look", "clip"]
    result = vpt(*arguments, "--max-new-tokens", 3, "--json")
    source = [tmp_path / "source" if one == folder else one for one in arguments]
    other = vpt(*source, "--max-new-tokens", 3, "--json", "--weights", "int8")
    assert json.loads(result.stdout)["ids"] == json.loads(other.stdout)["ids"]
    for refused, message in (
        (vpt(*arguments, "--weights", "float32"), "these are stored packed in int8"),
        (vpt("convert", folder, tmp_path / "again"), "is packed in int8 already: convert the checkpoint"),
        (vpt("convert", tmp_path / "source", tmp_path / "again", "--weights", "int3"), "--weights int3: it must be"),
        (
            vpt("convert", tmp_path / "source", tmp_path / "again", "--weights", "int8", "--dtype", "float32"),
            "give one of them",
        ),
    ):
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.output and not (tmp_path / "again").exists()
    assert vpt("verify", "--model", folder).exit_code == 0


def test_the_page_compares_with_the_numbers_of_a_packed_folder(folder: Path) -> None:
    answerer = make_answerer(str(folder), CPU)
    config, state = answerer._state()
    assert config == tiny_tied() and state[EMBEDDING].dtype == torch.float32
    check_state(config, state)


def test_another_device_is_refused(folder: Path) -> None:
    state = load_checkpoint(folder)[1]
    assert moved(state, CPU) is state
    with pytest.raises(ValueError, match="is for a CPU, and the device is cuda"):
        moved(state, torch.device("cuda"))


@pytest.mark.parametrize("change", [lambda weight: replace(weight, data=weight.data[1:]), lambda weight: None])
def test_packed_weights_of_a_state_dict_are_checked(folder: Path, change) -> None:
    config, state = load_checkpoint(folder)
    state[QKV] = change(state[QKV])
    with pytest.raises((ValueError, TypeError)) as error:
        Model.from_state(config, {name: one for name, one in state.items() if one is not None})
    assert f"{QKV}.data" in str(error.value)


def test_weights_that_int8_cannot_hold(tmp_path: Path) -> None:
    """A NaN is found while it is packed, named, and leaves nothing."""
    config, _ = write_variant(tmp_path / "source", CLIP)
    path = next((tmp_path / "source").glob("*.bin"))
    state = torch.load(path, weights_only=True)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate_up_proj.weight: weight has a NaN or an infinity"):
        convert.convert(Checkpoint.open(tmp_path / "source"), tmp_path / "target", weights="int8")
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failed_conversion_leaves_nothing(tmp_path: Path, failure) -> None:
    write_variant(tmp_path / "source", CLIP)

    def fail(done: int, total: int) -> None:
        if done > total / 2:
            assert list(tmp_path.glob("target*/*.safetensors"))
            raise failure

    with pytest.raises(failure):
        convert.convert(Checkpoint.open(tmp_path / "source"), tmp_path / "target", progress=fail, weights="int8")
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


_SLOW = """
import sys, time
from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.convert import convert

def slow(done, total):
    if done > total / 2:
        time.sleep(60)

convert(Checkpoint.open(sys.argv[1]), sys.argv[2], progress=slow, weights="int8")
"""


def test_a_killed_conversion_does_not_load(tmp_path: Path) -> None:
    write_variant(tmp_path / "source", CLIP)
    run = [sys.executable, "-c", _SLOW, str(tmp_path / "source"), str(tmp_path / "target")]
    child = subprocess.Popen(run, cwd=ROOT)
    unfinished, deadline = tmp_path / "target.incomplete", time.monotonic() + 60
    while not any(unfinished.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert unfinished.is_dir() and not (tmp_path / "target").exists()
    with pytest.raises(ValueError, match="config.json' does not exist"):
        Checkpoint.open(unfinished)
    # Completed by hand with another folder's configuration it still lacks what was not written.
    shutil.copyfile(tmp_path / "source/config.json", unfinished / "config.json")
    with pytest.raises(ValueError):
        Checkpoint.open(unfinished)


def test_names_of_products_cover_the_language_model_and_the_tower() -> None:
    config = tiny_config("seg")
    names = packed.products(config)
    rest = [name for name in fused_groups(config) if name not in names]
    state = random_state(config)
    matrices = {name for name in rest if name in state and state[name].dim() == 2 and not name.startswith("seg_")}
    assert matrices == {"model.embed_tokens.weight"}
    assert [name for name in names if packed.is_gated(name)] == [
        f"model.layers.{index}.mlp.gate_up_proj.weight" for index in range(config.num_hidden_layers)
    ]
