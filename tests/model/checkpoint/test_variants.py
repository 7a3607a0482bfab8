"""The seven released checkpoints: their layouts in tiny shapes, their true shapes and totals without memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.model.checkpoints import VARIANTS, byte_level, fields, write, write_variant
from tests.model.inputs import random_image, tiny_config, tiny_state
from vpt_model import Engine, Model
from vpt_model.app.cli import app
from vpt_model.checkpoint import random_state
from vpt_model.checkpoint.encoder_names import state_for
from vpt_model.checkpoint.load import Checkpoint, check_state
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import PRESETS
from vpt_model.published.verify import SAMPLE_QUESTION, parameter_counts, sample_picture
from vpt_model.text.tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[3]

# Parameters of the released models, each part and in total; a file stores a tied head once more.
PUBLISHED = {
    "clip": {"projector": 4_727_808, "stored": 2_447_087_104},
    "detection": {"projector": 3_940_352, "re-encoder": 304_368_640, "stored": 2_750_668_288},
    "seg": {"projector": 9_052_160, "re-encoder": 308_278_272, "stored": 2_759_689_728},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_layout(tmp_path: Path, name: str) -> None:
    config, state = write_variant(tmp_path, name)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == config and config.kind == VARIANTS[name].kind
    loaded = checkpoint.load()
    assert loaded.keys() == state.keys() == expected_shapes(config).keys()
    assert all(torch.equal(loaded[key], state[key]) and loaded[key].dtype == torch.bfloat16 for key in state)
    assert checkpoint.head == ("tied, stored twice, equal" if VARIANTS[name].tied else "untied")
    masked = [] if VARIANTS[name].aligned else ["para_mask_id, para_mask_ratio"]
    assert [notice.split(" in config")[0] for notice in checkpoint.notices] == masked
    Model.from_state(config, loaded)


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_come_from_the_tokenizer(tmp_path: Path, name: str) -> None:
    config, _ = write_variant(tmp_path, name)
    tokenizer = Checkpoint.open(tmp_path).tokenizer()
    assert tokenizer.ids == byte_level(config, VARIANTS[name].aligned).ids
    assert tokenizer.is_aligned_only == VARIANTS[name].aligned
    assert tokenizer.ids.kind_pad in tokenizer.ids.stop
    content = json.loads((tmp_path / "config.json").read_text())
    field = f"{config.kind}_image_token_id"
    (tmp_path / "config.json").write_text(json.dumps(content | {field: 5}))
    with pytest.raises(ValueError, match=f"vocabulary mismatch: config.json has {field} 5, the tokenizer says"):
        Checkpoint.open(tmp_path).tokenizer()


@pytest.mark.parametrize("kind", PUBLISHED)
def test_true_shapes(kind: str) -> None:
    config = replace(PRESETS["2b"], kind=kind)
    state = {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(config).items()}
    check_state(config, state)
    counts = parameter_counts(config)
    assert sum(tensor.numel() for tensor in state.values()) == PUBLISHED[kind]["stored"]
    assert counts["total"] == PUBLISHED[kind]["stored"] - counts["embedding"]
    assert counts["projector"] == PUBLISHED[kind]["projector"]
    assert counts.get("re-encoder", 0) == PUBLISHED[kind].get("re-encoder", 0)
    assert counts["language model"] == 1_310_340_608 and counts["vision tower"] == 665_271_296
    del state["model.norm.weight"]
    with pytest.raises(ValueError, match="1 problems.*\n  missing model.norm.weight"):
        check_state(config, state)


def test_true_shapes_of_the_7b() -> None:
    counts = parameter_counts(PRESETS["7b"])
    assert counts == {
        "language model": 6_525_621_760,
        "embedding": 544_997_376,
        "head": 544_997_376,
        "vision tower": 675_759_104,
        "projector": 25_711_616,
        "total": 8_317_087_232,
    }


@pytest.mark.parametrize(("kind", "prefix"), [("detection", "detection_model."), ("seg", "seg_model.")])
@pytest.mark.parametrize("preset", ["tiny", "2b"])
def test_reencoder_names_are_those_of_transformers(kind: str, prefix: str, preset: str) -> None:
    from transformers import Dinov2Config, Dinov2Model, SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = replace(PRESETS[preset], kind=kind)
    with torch.device("meta"):
        if kind == "detection":
            peer = Dinov2Model(Dinov2Config(**vars(config.dino)))
        else:
            peer = SamVisionEncoder(SamVisionConfig(**vars(config.sam)))
    ours = {name.removeprefix(prefix): shape for name, shape in expected_shapes(config).items() if prefix in name}
    found = state_for(peer, {name: torch.empty(shape, device="meta") for name, shape in ours.items()})
    assert len(found) == len(ours)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in peer.state_dict().items()}


def test_masks_of_training_change_no_answer(tmp_path: Path) -> None:
    """Whatever the file says about them, and about the number of forward passes."""
    image, answers = random_image(60, 80), []
    for mask, runs in ((1, 2), (0, 1)):
        content = fields(para_mask_id=mask, para_mask_ratio=mask / 2, num_inner_forward_run=runs)
        checkpoint = Checkpoint.open(write(tmp_path, tiny_state(), content))
        assert len(checkpoint.notices) == mask
        config = checkpoint.config
        engine = Engine(
            Model.from_state(config, checkpoint.load()), Tokenizer.byte_level(config.vocab_size, config.kind)
        )
        answers.append(engine.ask(image, "What?", looks=["clip"], max_new_tokens=6).ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_answers(tmp_path: Path, name: str) -> None:
    config, _ = write_variant(tmp_path / "model", name)
    Image.fromarray(random_image(60, 80).numpy()).save(tmp_path / "photo.png")
    arguments = ["ask", "--model", tmp_path / "model", "--image", tmp_path / "photo.png", "--question", "What?"]
    look = {"clip": "clip", "detection": "dino", "seg": "sam"}[config.kind]
    arguments += ["--max-new-tokens", "2", "--json", *([] if VARIANTS[name].aligned else ["--look", look])]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [item["kind"] for item in answer["looks"]] == ([] if VARIANTS[name].aligned else [look])
    if VARIANTS[name].aligned:
        arguments += ["--look", look]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 2 and "no action tokens" in result.stderr


_MEASURE = """
import json, sys
from vpt_model import Model
from vpt_model.checkpoint import Checkpoint

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

checkpoint = Checkpoint.open(sys.argv[1])
before = kilobytes("VmRSS")
model = Model.from_state(checkpoint.config, checkpoint.load(), consume=True)
weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
weights -= checkpoint.tensors["lm_head.weight"].nbytes if checkpoint.config.tie_word_embeddings else 0
print(json.dumps({"peak": (kilobytes("VmHWM") - before) * 1024, "weights": weights}))
"""


def test_peak_memory_while_loading(tmp_path: Path) -> None:
    """Files are mapped or read in pieces, and what is packed is let go: the weights are in memory once."""
    config = replace(
        tiny_config(),
        hidden_size=1024,
        num_attention_heads=8,
        mrope_section=(16, 24, 24),
        intermediate_size=4096,
        num_hidden_layers=8,
        vocab_size=16384,
        tie_word_embeddings=True,
        vision=replace(tiny_config().vision, hidden_size=1024),
    )
    write(tmp_path, random_state(config, 0, torch.bfloat16), fields(config), pickled=True)
    child = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    measured = json.loads(child.stdout)
    assert measured["weights"] > 270_000_000
    assert 0.9 * measured["weights"] < measured["peak"] <= 1.15 * measured["weights"], measured


@pytest.mark.parametrize("name", ["Qwen2-VL-2b-VPT-CLIP", "Qwen2-VL-2b-VPT-Seg-Alignment", "Qwen2-VL-7b-VPT-CLIP"])
def test_verify_tells_what_a_checkpoint_is(tmp_path: Path, name: str) -> None:
    config, state = write_variant(tmp_path, name)
    result = CliRunner().invoke(app, ["verify", "--model", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[1]: line.split()[-1] for line in result.stdout.splitlines() if line.startswith("  ")}
    counted = sum(tensor.numel() for key, tensor in state.items() if not (config.tie_word_embeddings and "head" in key))
    assert lines["total"] == f"{counted:,}"
    aligned = VARIANTS[name].aligned
    assert lines["kind_pad"] == str(byte_level(config).ids.kind_pad)
    assert (lines["action_start"] == "none") == aligned == ("aligned only" in result.stdout)
    assert "every expected tensor and no other" in result.stdout
    tied = "embedding and head: " + ("tied, stored twice, equal" if VARIANTS[name].tied else "untied")
    assert tied in result.stdout
    tokenizer = Checkpoint.open(tmp_path).tokenizer()
    engine = Engine(Model.from_state(config, state), tokenizer, max_looks=0)
    expected = engine.ask(sample_picture(), SAMPLE_QUESTION, max_new_tokens=16).ids
    assert f"ids {expected}" in result.stdout
    (tmp_path / "tokenizer.json").unlink()
    result = CliRunner().invoke(app, ["verify", "--model", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 2 and "tokenizer.json does not exist" in result.stderr and not result.stdout


def test_random_weights_answer_without_files(tmp_path: Path) -> None:
    Image.fromarray(random_image(60, 80).numpy()).save(tmp_path / "photo.png")
    arguments = ["ask", "--model", "random:tiny", "--image", str(tmp_path / "photo.png"), "--question", "What?"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "3", "--json"], catch_exceptions=False)
    assert result.exit_code == 0 and 1 <= len(json.loads(result.stdout)["ids"]) <= 3
