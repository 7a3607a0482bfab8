"""The engine against the recorded conversations of the authors' model: the same ids, logits within 1e-4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.model.engine.scripts import Fed, Wrapped, answers_of, question_of
from tests.model.inputs import golden, golden_again, golden_config, golden_state, golden_token_ids
from vpt_model.engine import Engine, perception
from vpt_model.engine.events import Answer
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import CropAndAppend, ReencodeAndAppend
from vpt_model.network.model import Model
from vpt_model.network.vision import VisionTower
from vpt_model.text.prompt import PromptFormat
from vpt_model.text.tokens import Tokenizer

VARIANTS = ["clip", "dino", "sam"]
CASES = ["clip", "dino", "sam", "region"]


def prompt(name: str, case: str, row: int) -> list[int]:
    """The recorded prompt without its padding."""
    tensors, _ = golden(name)
    ids, mask = tensors[f"{case}.input_ids"][row], tensors.get(f"{case}.attention_mask")
    return ids.tolist() if mask is None else ids[mask[row].bool()].tolist()


def turns(prompt: list[int], im_start: int, im_end: int) -> list[list[int]]:
    """Contents of the complete turns, without role and newline."""
    starts = [i + 3 for i, token in enumerate(prompt) if token == im_start]
    return [prompt[start : prompt.index(im_end, start)] for start in starts if im_end in prompt[start:]]


class RecordedTokenizer(Tokenizer):
    """The golden prompts are arbitrary ids: questions "0" and "1" stand for those of the rows, other texts likewise."""

    def __init__(self, name: str, prompts: list[list[int]]) -> None:
        ids = golden_token_ids(name)
        super().__init__(Tokenizer.byte_level(320, ids.kind)._backend, ids.kind)
        self.ids = ids
        self._texts = {}
        for row, row_prompt in enumerate(prompts):
            system, user, *rest = turns(row_prompt, ids.im_start, ids.im_end)
            self._texts |= {PromptFormat().system: system, f"\n{row}": user[user.index(ids.vision_end) + 1 :]}
            if row == 0 and rest and ids.image_pad in rest[1]:
                shown = [token for token in rest[1] if token != ids.image_pad]
                for number in range(shown.count(ids.vision_start)):
                    cut = shown.index(ids.vision_start)
                    self._texts["\n" * (number > 0) + f"Region {number}: "] = shown[:cut]
                    shown = shown[cut + 2 :]

    def encode(self, text: str) -> list[int]:
        return self._texts[text] if text in self._texts else super().encode(text)


class RecordedVision(VisionTower):
    """Sees the recorded pixels: an image filled with i stands for the images of row i."""

    def __init__(self, tower: VisionTower, name: str) -> None:
        vars(self).update(vars(tower))
        self.tensors = golden(name)[0]

    def plan(self, images, boxes, policy):
        """The first recorded image where the whole is asked for, else the others."""
        row = row_of(images[0])
        grids = self.tensors["gen_b2.image_grid_thw"][1:] if row else self.tensors["fwd.image_grid_thw"]
        grids = [tuple(grid[1:]) for grid in grids.tolist()]
        pixels = self.tensors["gen_b2.pixel_values_row1" if row else "fwd.pixel_values"]
        height, width, _ = images[0].shape
        seen = slice(1) if boxes == [(0, 0, 0, width, height)] else slice(1, None)
        parts = pixels.split([height * width for height, width in grids])
        return SimpleNamespace(grids=tuple(grids[seen]), pixels=torch.cat(parts[seen]))

    def embed_plan(self, images, plan):
        return self.embed_pixel_values(plan.pixels)


class Recorded(Wrapped):
    """What the recorded model is shown where it re-encodes by "clip" differs on purpose from its first image."""

    def __init__(self, executor: Executor, name: str) -> None:
        super().__init__(executor)
        self.name, self.controls = name, []

    def run(self, requests):
        results = super().run(requests)
        for number, (request, result) in enumerate(zip(requests, results, strict=True)):
            if isinstance(result, ReencodeAndAppend):
                self.controls.append(result.control)
            elif isinstance(request, CropAndAppend) and self.name == "clip":
                vision = self.executor.model.vision
                pixels, grids = golden_again("clip", row_of(request.picture.pixels))
                features = vision.forward(vision.embed_pixel_values(pixels), grids)
                request.picture.grids = tuple(grids)
                results[number] = replace(result, features=(features,))
        return results


class RecordedEngine(Engine):
    """Over the recorded weights, prompts and pixels."""

    def __init__(self, name: str, case: str, state: dict[str, torch.Tensor] | None = None, **options) -> None:
        self.name, tensors = name, golden(name)[0]
        prompts = [prompt(name, case, row) for row in range(len(tensors[f"{case}.input_ids"]))]
        weights = "clip" if name == "region" else name
        model = Model.from_state(golden_config(name), state or golden_state(weights))
        model = replace(model, vision=RecordedVision(model.vision, name))
        if model.encoder is not None:
            model.encoder.embed_regions = lambda images, boxes: model.encoder.embed_pixel_values(
                golden_again(name, row_of(images[0]))[0]
            )
        super().__init__(model, RecordedTokenizer(name, prompts), **options)
        self.recorded = self.executor = Recorded(self.executor, name)
        self.rows = range(len(prompts))

    def recorded_look(self) -> str:
        sidecar = golden(self.name)[1]
        boxes = [
            ",".join(f"{axis}{i}" for axis, i in zip("xyxy", box, strict=True)) for box in sidecar.get("boxes", [])
        ]
        return f"region:{'+'.join(boxes)}" if boxes else self.loop.reencoder

    def follow(self, forced: list[list[int]], steps: int) -> list[Answer]:
        """Answers of rows whose first tokens are `forced`, side by side."""
        questions = [
            question_of(self, str(row), image(row), [tokens], max_new_tokens=steps + len(tokens), keep_logits=True)
            for row, tokens in enumerate(forced)
        ]
        return answers_of(self, questions)


def image(row: int) -> torch.Tensor:
    return torch.full((150, 230, 3), row, dtype=torch.uint8)


def row_of(image: torch.Tensor) -> int:
    return int(image[0, 0, 0])


def recorded(name: str, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids [rows, steps] and their logits [rows, steps, vocab]."""
    tensors, _ = golden(name)
    rows = len(tensors[f"{case}.input_ids"]) if f"{case}.input_ids" in tensors else 1
    ids, logits = tensors[f"{case}.new_ids"], tensors[f"{case}.step_logits"]
    return ids.view(rows, -1), logits.view(rows, ids.numel() // rows, -1)


def matches(answers: list[Answer], name: str, case: str, skipped: tuple[int, ...] | None = None) -> None:
    ids, logits = recorded(name, case)
    assert len(answers) == len(ids)
    for row, answer in enumerate(answers):
        begin = skipped[row] if skipped else 0
        assert answer.ids[begin:] == ids[row].tolist()
        assert (answer.logits[begin:] - logits[row]).abs().max() <= 1e-4


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
    language, seen = engine.model.language, []
    norm = language._rms_norm
    monkeypatch.setattr(language, "_rms_norm", lambda x, weight: seen.append(x) or norm(x, weight))
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
    perturbed = weight.clone()
    perturbed[3, 5] += weight.std() / 10
    monkeypatch.setattr(engine.model.language, "layers", list(engine.model.language.layers))
    engine.model.language.layers[1] = replace(engine.model.language.layers[1], down_weight=perturbed)


FAULTS = [
    pre_norm_control, raw_action_embedding, grid_positions, shifted_positions, unconditioned_projector,
    perturbed_weight,
]  # fmt: skip


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
