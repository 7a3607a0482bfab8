"""The command line on the tiny preset: what it compares, writes and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.model.inputs import random_image, tiny_config, tiny_state
from vpt_model.app import cli
from vpt_model.app import demo as demonstration
from vpt_model.app.cli import app
from vpt_model.app.seen import STAGES
from vpt_model.app.terminal import choose_device
from vpt_model.checkpoint.load import moved
from vpt_model.engine import Engine
from vpt_model.network.model import Model
from vpt_model.text.tokens import Tokenizer


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(random_image(200, 280).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in the layout of a published one."""
    folder, config = tmp_path_factory.mktemp("checkpoint"), tiny_config()
    fields = asdict(config) | {"model_type": "qwen2_vl_vpt", "rope_scaling": {"mrope_section": config.mrope_section}}
    fields |= {"vision_encoder_ls": ["clip"], "vision_config": fields.pop("vision")}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tiny_state().items()}, folder / "model.safetensors")
    Tokenizer.byte_level(config.vocab_size, config.kind)._backend.save(str(folder / "tokenizer.json"))
    return folder


def vpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def demo(photo: Path, *arguments: object) -> Result:
    out = photo.with_name("demo.png")
    return vpt("demo", "--preset", "tiny", "--image", photo, "--tokens", 4, "--out", out, *arguments)


def test_demo_agrees_and_draws(photo: Path) -> None:
    result = demo(photo)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("identical ids") == 2 and "weights are random" in result.stdout
    for stage in STAGES:
        assert stage in result.stdout
    picture = np.asarray(Image.open(photo.with_name("demo.png")).convert("RGB"))
    assert min(picture.shape[:2]) > 600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000


def test_demo_reports_both_looks_as_json(photo: Path) -> None:
    result = demo(photo, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["passed"] and report["weights"] == "random" and report["image"] == [280, 200]
    region, clip = report["looks"]
    assert (region["look"], clip["look"]) == demonstration.LOOKS
    assert region["boxes"] == [[35, 0, 245, 150]] and clip["boxes"] == []
    for look in report["looks"]:
        assert look["ids_identical"] and look["ours"]["ids"] == look["published"]["ids"]
        assert 0 < look["largest_logit_difference"] <= report["limit"] <= 1e-3
        for run in (look["ours"], look["published"]):
            assert 0 < run["second_look_ms"] < run["total_ms"]
            assert sum(stage["milliseconds"] for stage in run["stages"]) <= run["total_ms"]


@pytest.mark.parametrize("weights", ("int8", "int4"))
def test_demo_over_weights_of_integers(photo: Path, weights: str) -> None:
    """It agrees up to the rounding of activations, which is far below what a wrong step does."""
    for looks in ((), ("--look", "dino", "--look", "sam")):
        assert demo(photo, "--weights", weights, *looks).exit_code == 0
    assert demo(photo, "--weights", weights, "--inject", "position").exit_code == 1


def test_demo_counts_the_work_of_both_procedures(photo: Path) -> None:
    """One pass over each token here; there two passes, twice the cache, and every image again in the second look."""
    report = json.loads(demo(photo, "--json", "--look", "clip").stdout)
    steps = {
        side: {(step["look"], step["stage"]): step["work"] for step in report["looks"][0][side]["stages"]}
        for side in ("ours", "published")
    }
    ours, published = steps["ours"], steps["published"]
    assert (2, "ViT") not in ours and published[2, "ViT"]["ViT calls"] == 2
    assert ours[1, "prefill"]["tokens"] * 2 == published[1, "prefill"]["tokens"]
    conversation = ours[1, "prefill"]["tokens"] + 1 + ours[2, "append"]["tokens"]
    assert published[2, "perceive"]["tokens"] == published[2, "append"]["tokens"] == conversation
    assert published[2, "decode"]["cache copies"] == 2 * ours[2, "decode"]["LM calls"]


def test_demo_has_one_procedures_weights_in_memory(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, published = [], []

    class Watched(demonstration.PublishedProcedure):
        def __init__(self, *arguments: Any) -> None:
            assert made and not [model for model in made if model() is not None]
            super().__init__(*arguments)
            published.append(weakref.ref(self))

    def build(*arguments: Any, **options: Any) -> Model:
        assert not [procedure for procedure in published if procedure() is not None]
        model = Model.from_state(*arguments, **options)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(demonstration, "PublishedProcedure", Watched)
    monkeypatch.setattr(demonstration, "Model", SimpleNamespace(from_state=build))
    assert demo(photo, "--look", "clip", "--look", "dino", "--json").exit_code == 0
    assert len(made) == len(published) == 2


def test_demo_takes_every_re_encoder(photo: Path) -> None:
    """One model for each; regions go to the first."""
    looks = ["sam", "region:x2,y1,x5,y4", "dino"]
    result = demo(photo, "--json", *(word for look in looks for word in ("--look", look)))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [look["look"] for look in report["looks"]] == looks and report["passed"]
    for look, patches in (("sam", 256), ("dino", 256)):
        [ours] = [entry["ours"] for entry in report["looks"] if entry["look"] == look]
        works = {stage["stage"]: stage["work"] for stage in ours["stages"] if stage["look"] == 2}
        assert works["ViT"] == {"ViT calls": 1, "patches": patches}


@pytest.mark.parametrize("fault", demonstration.FAULTS)
def test_a_corrupted_step_is_noticed(photo: Path, fault: str) -> None:
    result = demo(photo, "--inject", fault)
    assert result.exit_code == 1
    assert "DISAGREE" in result.stdout and "corrupted on purpose" in result.stdout
    report = json.loads(demo(photo, "--inject", fault, "--json").stdout)
    assert not report["passed"] and report["injected"] == fault
    # The fault is in the second look of the paths it concerns, far above rounding.
    differences = {look["look"]: look["largest_logit_difference"] for look in report["looks"]}
    assert differences["clip"] > 0.1
    assert (differences[demonstration.LOOKS[0]] > 0.1) == (fault != "control")


def test_default_photo_holds_more_than_one_look_can_show() -> None:
    assert demonstration.default_image().size == (1000, 872)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--look", "region:x2,y1"], "region:x2,y1"),
        (["--look", "seg"], "'clip'"),
        (["--preset", "3b"], "'3b'"),
        (["--inject", "weights"], "'weights'"),
        (["--weights", "w8a8"], "use 'int8'"),
        (["--inject", "control", "--look", "region:x0,y0,x1,y1"], "add --look clip"),
        (["--image", "missing.png"], "missing.png"),
        (["--out", "no/such/folder/demo.png"], "no/such/folder"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_bad_demo_input_ends_with_one_line(photo: Path, arguments: list[str], message: str) -> None:
    result = demo(photo, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output and not result.stdout
    assert not photo.with_name("demo.png").exists()


@pytest.mark.parametrize("package", ["matplotlib", "skimage"])
def test_missing_packages_are_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "vpt_model.app.figure", raising=False)
    monkeypatch.delattr("vpt_model.app.figure", raising=False)
    result = vpt("demo", "--preset", "tiny", "--out", tmp_path / "demo.png")
    assert result.exit_code == 2 and "pip install 'vpt-kernels[demo]'" in result.stderr


def test_ask_prints_what_happened(checkpoint: Path, photo: Path) -> None:
    arguments = ("--model", checkpoint, "--image", photo, "--question", "What is it?", "--max-new-tokens", 3)
    result = vpt("ask", *arguments, "--look", "region:x2,y1,x5,y4")
    assert result.exit_code == 0, result.output
    for line in ("said", "<|region_token_start|>", "region", "(35, 0, 245, 150)", "looked", "done", "append"):
        assert line in result.stdout
    assert re.search(r"loaded in \d+\.\d s; memory: now \d+\.\d\d GiB, at most \d+\.\d\d GiB", result.stdout)


def test_ask_answers_as_json(checkpoint: Path, photo: Path) -> None:
    arguments = ("--model", checkpoint, "--image", photo, "--question", "What is it?", "--max-new-tokens", 3)
    result = vpt("ask", *arguments, "--look", "clip", "--look", "region:x2,y1,x5,y4", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [look["kind"] for look in answer["looks"]] == ["clip", "region"]
    assert answer["looks"][1]["boxes"] == [[35, 0, 245, 150]]
    assert 1 <= len(answer["ids"]) <= 3 and answer["finish_reason"] in ("stop", "length")
    assert [stage["stage"] for stage in answer["stages"]][:3] == ["crop+embed", "ViT", "prefill"]
    assert 1e8 < answer["memory_bytes"]["now"] <= answer["memory_bytes"]["at most"] and answer["load_seconds"] > 0


@pytest.mark.parametrize("look", ["region:x2,y1,x5,y4+x0,y0,x1,y1", "clip", None])
def test_ask_draws_what_it_looked_at(checkpoint: Path, photo: Path, look: str | None) -> None:
    out = photo.with_name("answer.png")
    arguments = ("--model", checkpoint, "--image", photo, "--question", "$What_{is", "--max-new-tokens", 3)
    result = vpt("ask", *arguments, "--draw", out, *(("--look", look) if look else ()), "--json")
    assert result.exit_code == 0, result.output
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert min(picture.shape[:2]) > 600
    # The third panel is there for a second crop alone, the one before it for any look; the title is above both.
    height, width = picture.shape[:2]
    panels = [picture[height // 6 : height // 2, width * n // 3 + 40 : width * (n + 1) // 3 - 20] for n in range(3)]
    drawn = [len(np.unique(panel.reshape(-1, 3), axis=0)) > 100 for panel in panels]
    assert drawn == [True, look is not None, look is not None and "+" in look]


@pytest.mark.parametrize("out, message", [("no/such/folder/a.png", "make it first"), (".", "directory")])
def test_a_drawing_that_cannot_be_written_is_refused_before_the_answer(out: str, message: str, photo: Path) -> None:
    result = vpt("ask", "--image", photo, "--question", "what?", "--draw", out)
    assert result.exit_code == 2 and message in result.stderr and "decode" not in result.stdout


def test_ask_runs_the_checkpoint_it_is_given(checkpoint: Path, photo: Path) -> None:
    """The ids are those of the model in memory."""
    from vpt_model import Engine, Model

    config = tiny_config()
    engine = Engine(Model.from_state(config, tiny_state()), Tokenizer.byte_level(config.vocab_size, config.kind))
    expected = engine.ask(photo, "What is it?", looks=["clip"], max_new_tokens=5).ids
    arguments = ("--model", checkpoint, "--image", photo, "--question", "What is it?", "--max-new-tokens", 5)
    assert json.loads(vpt("ask", *arguments, "--look", "clip", "--json").stdout)["ids"] == expected


@pytest.mark.parametrize("broken", ["model", "image", "weights"])
def test_bad_ask_input_ends_with_one_line(broken: str, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    model, image = checkpoint, photo
    if broken == "model":
        model = tmp_path / "nowhere"
    elif broken == "image":
        image = tmp_path / "cut.png"
        image.write_bytes(photo.read_bytes()[:200])
    else:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text((checkpoint / "config.json").read_text())
        save_file({"model.norm.weight": torch.ones(3)}, model / "model.safetensors")
    result = vpt("ask", "--model", model, "--image", image, "--question", "What is it?")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert not result.stdout


def test_env_reports_the_machine() -> None:
    result = vpt("env")
    assert result.exit_code == 0 and torch.__version__ in result.stdout


def test_without_a_command_there_is_help() -> None:
    assert all(command in vpt("--help").stdout for command in ("demo", "ask", "env"))


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let torch see so many GPUs; the numbers that are made the current one."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    "name, count, chosen",
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_device_by_name(name: str, count: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = gpus(count, monkeypatch)
    device = choose_device(name)
    assert device == torch.device(chosen) and current == ([device.index] if device.type == "cuda" else [])


@pytest.mark.parametrize("command", ["ask", "demo", "eval-mini", "chat"])
@pytest.mark.parametrize(
    "name, count, message",
    [
        ("gpu", 1, "--device gpu: it must be auto, cpu, cuda or cuda:N"),
        ("cuda:-1", 1, "--device cuda:-1: it must be"),
        ("cuda:2", 2, "GPUs 0 to 1 only"),
        ("cuda", 0, "sees no GPU; give --device cpu"),
    ],
)
def test_wrong_devices_end_with_one_line(
    command: str, name: str, count: int, message: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count, monkeypatch)
    needed = {"ask": ["--question", "what?"], "demo": ["--out", photo.with_name("demo.png")]}.get(command, [])
    result = vpt(command, *needed, "--device", name)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_ask_and_demo_tell_how_long_the_warm_up_took(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "warm_up", lambda self: {"decode": 1.5, "tower": 0.75})
    asked = vpt("ask", "--question", "what?", "--max-new-tokens", 2, "--device", "cpu")
    assert "warmed up on cpu in 2.2 s" in asked.stdout
    answer = json.loads(vpt("ask", "--question", "what?", "--max-new-tokens", 2, "--json").stdout)
    assert answer["warm_up_seconds"] == {"decode": 1.5, "tower": 0.75} and answer["device"] == "cpu"
    shown = demo(photo, "--look", "clip")
    assert "warmed up in 2.2 s" in shown.stdout and "on cpu" in shown.stdout


def test_nothing_is_said_of_a_warm_up_on_a_cpu(photo: Path) -> None:
    assert "warmed up" not in vpt("ask", "--question", "what?", "--max-new-tokens", 2, "--device", "cpu").stdout


def test_commands_hand_the_device_on(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight goes where --device says, before a model is made of it."""
    places: list[torch.device] = []

    def refuse(config: object, state: dict[str, torch.Tensor], *rest: object, **options: object) -> None:
        places.extend({tensor.device for tensor in state.values()})
        raise ValueError("far enough")

    monkeypatch.setattr(cli, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(Model, "from_state", refuse)
    asks = ["ask", "--question", "what?"], ["demo"], ["eval-mini", "--count", 1], ["chat"], ["app", "--port", 0]
    for command in asks:
        result = vpt(*command, *(["--out", photo.with_name("demo.png")] if command == ["demo"] else []))
        assert "far enough" in result.stderr, command
    assert places == [torch.device("meta")] * 5


def test_an_unknown_precision_is_refused() -> None:
    for command in (["ask", "--question", "what?"], ["demo"], ["chat"], ["app", "--port", 0]):
        result = vpt(*command, "--weights", "int3")
        assert result.exit_code == 2 and "weights is 'int3'; it must be one of auto, float32" in result.stderr, command


def test_moved_weights_share_what_they_shared() -> None:
    whole = torch.arange(12.0).view(4, 3)
    state = {"q": whole[:1], "k": whole[1:], "embedding": torch.ones(2, 3)}
    state["head"] = state["embedding"]
    far = moved(state, torch.device("meta"))
    assert {tensor.device.type for tensor in far.values()} == {"meta"}
    assert all(far[name].shape == tensor.shape and far[name].dtype == tensor.dtype for name, tensor in state.items())
    for one, other in (("q", "k"), ("embedding", "head")):
        assert far[one].untyped_storage()._cdata == far[other].untyped_storage()._cdata
    assert far["k"].storage_offset() == 3 and moved(state, torch.device("cpu")) is state


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "vpt_model.app.cli", "ask", "--question", "what?", "--device", "gpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "--device gpu" in result.stderr
