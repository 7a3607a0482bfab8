"""The engine against the recorded conversations of the authors' model: the same ids, logits within 1e-4."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import torch

from tests.model.inputs import golden, golden_config, golden_state, golden_token_ids, random_image
from vpt_model.engine import Engine
from vpt_model.events import Answer
from vpt_model.model import Model
from vpt_model.prompt import PromptFormat
from vpt_model.tokens import Tokenizer

IMAGE = random_image(150, 230)
QUESTION = "Recorded question"


class RecordedTokenizer(Tokenizer):
    """The golden prompts are arbitrary ids: these texts stand for them."""

    def __init__(self, prompt: list[int]) -> None:
        super().__init__(Tokenizer.byte_level(320, "clip")._backend, "clip")
        self.ids = replace(golden_token_ids(), stop=frozenset({257}))
        self._texts = {"Region 0: ": [40, 41, 42], "\nRegion 1: ": [10, 41, 42, 42]}
        self._texts |= {PromptFormat().system: prompt[3:9], f"\n{QUESTION}": prompt[40:54]}

    def encode(self, text: str) -> list[int]:
        return self._texts[text] if text in self._texts else super().encode(text)


class RecordedEngine(Engine):
    """Sees the recorded pixels, and for re-encoding those of another image, as the golden case has it."""

    def __init__(self, case: str, state: dict[str, torch.Tensor] | None = None, **options) -> None:
        self.recorded = golden(case)[0]
        model = Model.from_state(golden_config(), state or golden_state())
        super().__init__(model, RecordedTokenizer(self.recorded["fwd.input_ids"][0].tolist()), **options)

    def encoded(self, pixels: str, grids: str) -> tuple[list[torch.Tensor], tuple[tuple[int, int], ...]]:
        sizes = tuple((height, width) for _, height, width in self.recorded[grids].tolist())
        vision = self.model.vision
        features = vision.forward(vision.embed_pixel_values(self.recorded[pixels]), sizes)
        return list(features.split([height * width // 4 for height, width in sizes])), sizes

    def _look(self, talk, boxes):
        features, grids = self.encoded("fwd.pixel_values", "fwd.image_grid_thw")
        seen = slice(1, None) if talk.turns else slice(1)
        return features[seen], grids[seen]

    def _reencode(self, talk, turn):
        (talk.features,), talk.grids = self.encoded("fwd.clip_pixel_values", "fwd.clip_images_grid_thw")
        return super()._reencode(talk, turn)

    def control_state(self, hidden):
        self.control = hidden
        return hidden


def matches(answer: Answer, recorded: dict[str, torch.Tensor], case: str, skipped: int = 0) -> None:
    assert answer.ids[skipped:] == recorded[f"{case}.new_ids"].tolist()
    assert (answer.logits[skipped:] - recorded[f"{case}.step_logits"]).abs().max() <= 1e-4


def test_re_encoding():
    engine = RecordedEngine("clip")
    matches(engine.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=12, keep_logits=True), engine.recorded, "gen")
    assert (engine.control - engine.recorded["fwd.control"]).abs().max() <= 1e-4


def test_two_regions():
    engine = RecordedEngine("region")
    looks = ["region:x1,y2,x4,y5+x0,y0,x3,y6"]
    matches(engine.ask(IMAGE, QUESTION, looks=looks, max_new_tokens=12, keep_logits=True), engine.recorded, "gen")


def test_round_one_that_emits_actions_by_itself():
    row = golden("clip")[0]["r1_free.lm_head_row_action_start"]
    state = dict(golden_state())
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][golden_token_ids().action_start] = row
    engine = RecordedEngine("clip", state, max_looks=0)
    matches(engine.ask(IMAGE, QUESTION, max_new_tokens=16, keep_logits=True), engine.recorded, "r1_free")
    # With a look left, the same start token asks for it.
    engine = RecordedEngine("clip", state)
    assert [look.kind for look in engine.ask(IMAGE, QUESTION, max_new_tokens=2).looks] == ["clip"]


def test_round_one_behind_an_action_start():
    engine = RecordedEngine("clip", max_looks=0)
    user = engine.tokenizer.encode(f"\n{QUESTION}")
    request = {"image": IMAGE, "max_new_tokens": 13, "keep_logits": True}
    *_, done = engine._events(engine._run(user, forced=deque([[engine.ids.action_start]]), **request))
    matches(done.answer, engine.recorded, "r1_forced", skipped=1)
