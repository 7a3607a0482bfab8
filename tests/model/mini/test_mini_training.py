"""What vpt-mini's training computes is what the engine serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.mini.conversations import CONFIG, GRID, IGNORE, Row, batch, conversations, converse, patches, positions
from examples.mini.export import export
from examples.mini.learner import Learner, initial_state
from examples.mini.network import Network
from examples.mini.train import train
from vpt_model import mini
from vpt_model.checkpoint import random_state
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.engine import Engine
from vpt_model.mini.scenes import KINDS, make_question, make_scene
from vpt_model.mini.vocabulary import DIRECT_TRIGGER, LOOK_TRIGGERS, tokenizer
from vpt_model.network.model import Model
from vpt_model.text.prompt import PromptFormat

SEED = 5


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    # Weights of order one: the initial ones would hide what small branches compute. float64: no rounding to explain.
    return random_state(CONFIG, 3, torch.float64)


@pytest.fixture(scope="module")
def scene():
    return make_scene(SEED, "train")


def logits_in_training(state: dict, scene, row: Row) -> torch.Tensor:
    """Of every token of the row, [T, vocab], by the differentiable functions alone."""
    network, ids = Network(CONFIG, GRID), tokenizer().ids
    features = network.see(state, torch.from_numpy(patches([scene], [row.looks])))
    tokens = torch.tensor(row.tokens)
    embeds = state["model.embed_tokens.weight"][tokens][None].clone()
    embeds[0, tokens == ids.image_pad] = features.flatten(0, 1)
    where = torch.from_numpy(positions(row))[None]
    if ids.action_start in row.tokens:
        start = row.tokens.index(ids.action_start)
        control = network.read(state, embeds, where)[0][:, start]
        embeds[:, start + 1] = control
        embeds[0, tokens == ids.kind_pad] = network.reencode(state, features[:1], control)[0]
    return network.logits(state, network.read(state, embeds, where)[0])[0]


@pytest.mark.parametrize("mode", ("look", "direct"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_computes_the_logits_of_training(state: dict, scene, kind: str, mode: str) -> None:
    question = make_question(scene, kind, SEED)
    path = None if mode == "direct" else question.look or "clip"
    trigger = DIRECT_TRIGGER if path is None else LOOK_TRIGGERS[path.partition(":")[0]]
    engine = Engine(Model.from_state(CONFIG, state), tokenizer(), prompt=PromptFormat(trigger=trigger))
    forced = None if path is None else [path]
    answer = engine.ask(scene.pixels, question.text, looks=forced, max_new_tokens=4, keep_logits=True)

    row = converse(scene, question, mode)
    spoken = row.tokens[: row.answers + 1] + answer.ids
    row = Row(row.name, spoken, [], row.answers, row.looks, row.blank)
    trained = logits_in_training(state, scene, row)[row.answers : row.answers + len(answer.ids)]
    assert len(answer.looks) == (path is not None)
    torch.testing.assert_close(trained, answer.logits, rtol=0, atol=1e-6)


def test_a_batch_teaches_what_its_conversations_say() -> None:
    """The packed, padded, sorted batch gives each conversation's own loss."""
    learner = Learner(CONFIG, 0, 1e-3)
    learner.state.update(random_state(CONFIG, 3))
    made = batch([SEED], "whole")
    scene = make_scene(SEED, "train")
    rows = iter(sorted(conversations(scene, SEED, "whole"), key=lambda row: len(row.tokens)))
    with torch.no_grad():
        features = learner.network.see(learner.state, torch.from_numpy(made["patches"]))
        for group in made["groups"]:
            # Without what is random (blanking) or a hint beside the loss, of the last turns alone.
            group["blanks"][:], group["asked"] = 0, group["asked"][:0]
            group["targets"] = np.where(group["turn"] == 1, group["targets"], IGNORE)
            total, weight, _ = learner._group(group, features)
            expected = 0.0
            for row in (next(rows) for _ in group["names"]):
                logits = logits_in_training(learner.state, scene, row)
                targets = torch.tensor(row.targets)
                targets[: row.answers] = IGNORE
                losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
                expected += row.weight * losses.item()
            assert total.item() == pytest.approx(expected, rel=1e-4) and weight >= 0
    assert next(rows, None) is None


def test_gradients_reach_every_weight_that_serves() -> None:
    learner = Learner(CONFIG, 0, 1e-3)
    loss, _ = learner.loss(batch(range(4), "whole"))
    loss.backward()
    # The published layout has these two modules; the re-encoder "clip" does not use them.
    unused = ("clip_projector.linear_feature.", "clip_projector.layernorm_feature.")
    without = [name for name, tensor in learner.state.items() if tensor.grad is None]
    assert all(name.startswith(unused) for name in without) and len(without) == 4
    assert set(learner.state) == set(expected_shapes(CONFIG))


def test_a_saved_learner_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    batches = [batch([number], "whole") for number in range(3)]
    straight, stopped = Learner(CONFIG, 0, 1e-3), Learner(CONFIG, 0, 1e-3)
    for made in batches[:2]:
        straight.step(made, 1.0), stopped.step(made, 1.0)
    stopped.save(tmp_path / "checkpoint.pt", 2, 12.5)
    resumed = Learner(CONFIG, 1, 1e-3)
    assert resumed.load(tmp_path / "checkpoint.pt") == (2, 12.5)
    assert straight.step(batches[2], 0.5)[0] == resumed.step(batches[2], 0.5)[0]
    for name, tensor in straight.state.items():
        assert torch.equal(tensor, resumed.state[name]), name


@pytest.mark.slow
def test_the_command_trains_stops_and_goes_on(tmp_path: Path) -> None:
    """Two runs of a few steps: the second begins where the first stopped, and its weights load."""
    steps = []
    for minutes in (0.05, 0.1):
        train(tmp_path, minutes=minutes, threads=1, scenes=2)
        steps.append(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"])
        elapsed = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["elapsed"]
        assert minutes * 60 <= elapsed < minutes * 60 + 30
    assert 0 < steps[0] < steps[1]
    mini.load(folder=tmp_path / "model")


def test_exported_weights_are_a_checkpoint_of_the_released_layout(tmp_path: Path) -> None:
    state = initial_state(CONFIG, 0)
    export(state, tmp_path / "model")
    config, loaded, words = mini.load_state(torch.float32, tmp_path / "model")
    assert config == CONFIG and words.ids == tokenizer().ids
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.half().float()), name
    text = "\nWhat is on the tags of the red circle and the blue square?"
    assert words.encode(text) == tokenizer().encode(text) and words.decode(words.encode(text)) == text
