"""The engine against the recorded conversations of the authors' model: the same ids, logits within 1e-4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.model.engine.recorded import CASES, VARIANTS, RecordedEngine, image, matches, prompt, recorded
from tests.model.engine.scripts import Fed, Wrapped
from tests.model.inputs import golden, golden_state, golden_token_ids
from vpt_kernels import PackedWeight
from vpt_model.engine import perception
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import ReencodeAndAppend
from vpt_model.network import fused


@pytest.mark.parametrize("name", CASES)
def test_second_round(name):
    engine = RecordedEngine(name, "fwd")
    steps = recorded(name, "gen")[0].shape[1]
    options = {"looks": [engine.recorded_look()], "max_new_tokens": steps, "keep_logits": True}
    matches([engine.ask(image(0), "0", **options)], name, "gen")
    if name != "region":
        assert (engine.recorded.controls[0] - golden(name)[0]["fwd.control"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_second_round_of_a_batch(name):
    engine = RecordedEngine(name, "gen_b2")
    steps, looks = recorded(name, "gen_b2")[0].shape[1], [[name]] * len(engine.rows)
    options = {"looks": looks, "max_new_tokens": steps, "keep_logits": True}
    answers = engine.ask_batch([image(row) for row in engine.rows], [str(row) for row in engine.rows], **options)
    matches(answers, name, "gen_b2")


@pytest.mark.parametrize("name", VARIANTS)
def test_round_one_behind_an_action_start(name):
    engine = RecordedEngine(name, "r1_forced", max_looks=0)
    steps = recorded(name, "r1_forced")[0].shape[1]
    matches(engine.follow([[engine.ids.action_start]], steps), name, "r1_forced", skipped=(1,))


@pytest.mark.parametrize("name", VARIANTS)
def test_round_one_that_emits_actions_by_itself(name):
    state = dict(golden_state(name))
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    row = golden(name)[0]["r1_free.lm_head_row_action_start"]
    state["lm_head.weight"][golden_token_ids(name).action_start] = row
    engine = RecordedEngine(name, "r1_free", state, max_looks=0)
    matches(engine.follow([[]], recorded(name, "r1_free")[0].shape[1]), name, "r1_free")
    # With a look left, the same start token asks for it.
    engine = RecordedEngine(name, "r1_free", state)
    assert [look.kind for look in engine.ask(image(0), "0", max_new_tokens=2).looks] == [name]


@pytest.mark.parametrize("name", VARIANTS)
def test_round_one_of_a_batch(name):
    engine = RecordedEngine(name, "r1_b2", max_looks=0)
    start, steps = engine.ids.action_start, recorded(name, "r1_b2")[0].shape[1]
    forced = [[start] if prompt(name, "r1_b2", row)[-1] == start else [] for row in engine.rows]
    matches(engine.follow(forced, steps), name, "r1_b2", skipped=tuple(len(tokens) for tokens in forced))


class Altered(Wrapped):
    """Changes the look before its chunk is fed, when the control state is known."""

    def __init__(self, executor: Executor, change: Callable[[ReencodeAndAppend], ReencodeAndAppend]) -> None:
        super().__init__(executor)
        self.change = change

    def run(self, requests):
        return [self.change(r) if isinstance(r, ReencodeAndAppend) else r for r in super().run(requests)]


def pre_norm_control(engine, monkeypatch):
    """h* is taken in front of the final norm."""
    seen, norm = [], fused.add_rms_norm

    def watched(x, delta, weight, eps):
        total, normed = norm(x, delta, weight, eps)
        seen.append(total)
        return total, normed

    monkeypatch.setattr(fused, "add_rms_norm", watched)
    engine.executor = Altered(engine.executor, lambda look: replace(look, control=seen[-1][-1:]))


def raw_action_embedding(engine, monkeypatch):
    """The action token keeps its own embedding."""
    write = perception.reencode_into

    def write_and_reset(model, features, control, embeds, *where):
        embeds[0] = model.language.embed(torch.tensor([engine.ids.action]))[0]
        write(model, features, control, embeds, *where)

    monkeypatch.setattr(perception, "reencode_into", write_and_reset)


def grid_positions(engine, monkeypatch):
    """The pads of the re-encoded image get the positions of an image, row by row."""

    def with_grid(look):
        found = look.positions.clone()
        pads = (torch.tensor(look.tokens) == engine.ids.kind_pad).nonzero().flatten()
        columns = len(pads) // 2
        cells = torch.arange(len(pads))
        found[:, pads] = found[0, pads[0]] + torch.stack([0 * cells, cells // columns, cells % columns])
        found[:, pads[-1] + 1 :] -= len(pads) - columns
        return replace(look, positions=found)

    engine.executor = Altered(engine.executor, with_grid)


def shifted_positions(engine, monkeypatch):
    """The second look is appended one position too far."""
    engine.executor = Altered(engine.executor, lambda look: replace(look, positions=look.positions + 1))


def unconditioned_projector(engine, monkeypatch):
    """The re-encoded image is projected without the control state."""
    write = perception.control_cross_attention_into
    monkeypatch.setattr(
        perception, "control_cross_attention_into", lambda features, control, *rest: write(features, None, *rest)
    )


def perturbed_weight(engine, monkeypatch):
    """One weight of the language model is off by a tenth of its matrix's spread."""
    weight = engine.model.language.layers[1].down_weight
    weight = weight.dequantize() if isinstance(weight, PackedWeight) else weight
    perturbed = weight.clone()
    perturbed[3, 5] += weight.std() / 10
    monkeypatch.setattr(engine.model.language, "layers", list(engine.model.language.layers))
    engine.model.language.layers[1] = replace(engine.model.language.layers[1], down_weight=perturbed)


FAULTS = [
    pre_norm_control,
    raw_action_embedding,
    grid_positions,
    shifted_positions,
    unconditioned_projector,
    perturbed_weight,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_faulty_engine_does_not_match(name, fault, monkeypatch):
    engine = RecordedEngine(name, "fwd")
    fault(engine, monkeypatch)
    logits = engine.ask(image(0), "0", looks=[name], max_new_tokens=1, keep_logits=True).logits
    difference = (logits - recorded(name, "gen")[1][0, :1]).abs().max()
    assert difference > (3e-4 if fault is perturbed_weight else 0.05)


def test_the_recorded_prompts_are_rebuilt():
    """The engine is given texts and looks, not prompts: what it feeds must be the recorded ids."""
    for name in CASES:
        engine = RecordedEngine(name, "fwd")
        # In the recorded runs nothing ends an answer; here the end of the forced one must.
        engine.loop.ids = replace(engine.ids, stop=frozenset({engine.ids.im_end}))
        fed = engine.executor = Fed(engine.executor)
        engine.ask(image(0), "0", looks=[engine.recorded_look()], max_new_tokens=1)
        assert fed.tokens == prompt(name, "fwd", 0)
