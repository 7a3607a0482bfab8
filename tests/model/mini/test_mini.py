"""vpt-mini from its shipped weights: right answers on pictures it never saw, whatever computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from examples.mini.card import table
from vpt_model import mini
from vpt_model.app import demo as demonstration
from vpt_model.app.cli import app
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import PRESETS
from vpt_model.mini.evaluation import CONTROLS, PATHS, READ, Score, agreement, evaluate, make_engine, plan, using
from vpt_model.mini.scenes import KINDS, fingerprint

# Least shares of right answers and of right paths, by the free choice, of the 50 questions that the test repeats: the
# model card's figures less four standard deviations of a sample of 50.
LEAST = {"tag": (0.96, 1), "two tags": (0.96, 1), "attribute": (0.96, 1), "count": (0.76, 1)}
MOST_DIRECT = 0.25
ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "bench/results/vpt-mini"


def vpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_weights_answer_what_they_never_saw(kind: str) -> None:
    score = Score.of(evaluate(make_engine("free", kind, torch.float32), kind, 50))
    right, right_path = LEAST[kind]
    assert score.count == 50 and score.right >= right and score.right_path >= right_path, score


def test_without_a_second_look_tags_are_guessed() -> None:
    score = Score.of(evaluate(make_engine("direct", "tag", torch.float32), "tag", 50))
    assert score.right <= MOST_DIRECT and score.right_path == 0


@pytest.mark.parametrize("kind", KINDS)
def test_backends_choose_the_same_tokens(kind: str) -> None:
    results = []
    for backend in ("cpp", "reference"):
        with using(backend):
            results.append(evaluate(make_engine("free", kind, torch.float32), kind, 16))
    assert agreement(*results) == 1


def test_every_combination_is_planned_once() -> None:
    runs = plan(["cpp", "reference"], [torch.float32, torch.bfloat16])
    assert len(runs) == len(set(runs)) == len(PATHS) * len(KINDS) + len(CONTROLS) + 3 * len(KINDS)


def test_unknown_paths_and_controls_are_refused() -> None:
    with pytest.raises(ValueError, match="sideways.*free"):
        make_engine("sideways", "tag", torch.float32)
    with pytest.raises(ValueError, match="wrong.*true"):
        make_engine("free", "count", torch.float32, control="wrong")


def test_the_control_state_is_what_the_experiment_says() -> None:
    """Without it, and with another question's, the answers' logits differ from those with the true one."""
    logits = {}
    for control in CONTROLS:
        engine = make_engine("always look", "count", torch.float32, control)
        asked = [(image, "How many objects are red?") for image in _pictures()]
        logits[control] = [engine.ask(*question, max_new_tokens=2, keep_logits=True).logits[0] for question in asked]
    for control in CONTROLS[1:]:
        assert not torch.equal(logits["true"][1], logits[control][1])
    # The first question has none before it.
    assert torch.equal(logits["true"][0], logits["another's"][0])


def _pictures() -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (298, 298, 3), dtype=np.uint8) for seed in (0, 1)]


def test_the_package_ships_a_small_float16_checkpoint_and_its_card() -> None:
    config, state, _ = mini.load_state(torch.float16)
    assert config == PRESETS["mini"]
    total = sum(tensor.numel() for name, tensor in state.items() if name != "lm_head.weight")
    assert total <= 4_000_000 and set(state) == set(expected_shapes(config))
    assert sum(path.stat().st_size for path in mini.FOLDER.iterdir()) <= 8 << 20
    card = (mini.FOLDER / "README.md").read_text(encoding="utf-8")
    assert fingerprint() in card, "the pictures' generator is not the one that the weights were trained with"
    evaluation = json.loads((RESULTS / "evaluation.json").read_text())
    assert table(evaluation) in card, "python -m examples.mini.card writes the card from the evaluation"


def right(name: str, kind: str, path: str, control: str = "true") -> str:
    """A share of right answers in a committed evaluation, as prose gives it."""
    lines = json.loads((RESULTS / f"{name}.json").read_text())
    found = next(line for line in lines if (line["kind"], line["path"], line["control"]) == (kind, path, control))
    share = 100 * found["score"]["right"]
    return f"{share:.1f} %" if kind == "tag" or share > 99 else f"{share:.0f} %"


def test_the_prose_repeats_the_committed_evaluations() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"tags read {right('evaluation', 'tag', 'free')} with a second look, {right('evaluation', 'tag', 'direct')}"
        in readme
    )
    assert (
        f"{right('evaluation', 'count', 'free')} with its own control state, "
        f"{right('evaluation', 'count', 'free', 'zero')} without it, "
        f"{right('evaluation', 'count', 'direct')} with no second look"
    ) in readme
    card = " ".join((mini.FOLDER / "README.md").read_text(encoding="utf-8").split())
    assert f"(`--control first-look`): tags {right('evaluation-first-look', 'tag', 'direct')}," in card
    assert f"(`--control crop`, 7 minutes): {right('evaluation-crop', READ, 'free')}." in card


def test_eval_mini_reports_as_json_and_as_a_table() -> None:
    lines = json.loads(vpt("eval-mini", "--count", 2, "--backend", "cpp", "--json").stdout)
    assert len(lines) == len(plan(["cpp"], [torch.float32]))
    assert {line["path"] for line in lines} == set(PATHS) and {line["kind"] for line in lines} == {*KINDS, READ}
    table = vpt("eval-mini", "--count", 1, "--backend", "cpp", "--dtype", "bfloat16")
    assert table.exit_code == 0 and "right path" in table.stdout and fingerprint()[:16] in table.stdout
    assert vpt("eval-mini", "--dtype", "int8").exit_code == 2


def test_demo_tells_a_story_with_the_truth_and_compares(tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    result = vpt("demo", "--seed", 3, "--out", out, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["passed"] and report["weights"] == "trained"
    assert [chapter["kind"] for chapter in report["story"]] == list(KINDS)
    for chapter in report["story"]:
        assert chapter["right"] == (chapter["answer"] == chapter["truth"])
        assert chapter["timeline"][0][0] < chapter["timeline"][-1][0]
    assert all(look["ids_identical"] for look in report["looks"])
    assert min(Image.open(out).size) > 600
    text = vpt("demo", "--seed", 3, "--out", out).stdout
    assert report["story"][0]["question"] in text and "truth" in text and "trained" not in text.split("truth")[0]


def test_demo_of_trained_weights_notices_a_fault(tmp_path: Path) -> None:
    for fault in demonstration.FAULTS:
        result = vpt("demo", "--seed", 3, "--out", tmp_path / "demo.png", "--inject", fault, "--json")
        assert result.exit_code == 1 and not json.loads(result.stdout)["passed"], fault


def test_ask_answers_without_a_model_or_an_image() -> None:
    scene_question = json.loads(vpt("ask", "--question", "How many objects are red?", "--json").stdout)
    assert scene_question["text"]
    assert vpt("ask", "--question", "What?", "--model", "random:tiny").exit_code == 2
    refused = vpt("demo", "--image", "photo.png")
    assert refused.exit_code == 2


def test_the_page_on_weights_repeats_the_committed_evaluation() -> None:
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in json.loads((RESULTS / "evaluation-weights.json").read_text()):
        lines.setdefault(line["dtype"], []).append(line)
    right = {}
    for kept, found in lines.items():
        assert [line["kind"] for line in found] == list(KINDS) and len({line["score"]["count"] for line in found}) == 1
        assert f"{found[0]['score']['count']:,} questions" in page
        shares = [line["score"]["right"] for line in found]
        right[kept] = sum(shares) / len(shares)
        same = sum(line["agreement"] or 0 for line in found) / len(found)
        cells = [f"{share:.1%}" for share in shares] + [f"{right[kept]:.2%}", f"{same:.2%}" if same else ""]
        assert f"| {kept} | {' | '.join(cells)} |".replace("|  |", "| |") in page
    assert list(right) == ["float32", "bfloat16", "float16", "int8", "int4", "w8a8"]
    assert right["float32"] - right["bfloat16"] <= 0.003 and all(
        right["float32"] - right[kept] <= 0.01 for kept in ("int8", "int4", "w8a8")
    )
