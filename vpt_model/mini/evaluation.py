"""`vpt eval-mini`: how often vpt-mini is right, by kind of question, path, backend and dtype; seen test scenes only once.

Paths: "direct" asks for an answer from the first look, "always look" asks for a second one (both by the sentence that
the training used for it), "free" leaves the choice to the model. Photographs, seeds and so pictures are those of the
test split, of which training saw none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from vpt_model import language, perception, vision
from vpt_model.engine import Engine
from vpt_model.events import Answer
from vpt_model.mini.scenes import KINDS, Question, Scene, make_question, make_scene
from vpt_model.mini.vocabulary import DIRECT_TRIGGER, LOOK_TRIGGERS
from vpt_model.prompt import PromptFormat

PATHS = ("direct", "always look", "free")
CONTROLS = ("true", "zero", "another's")
MAX_NEW_TOKENS = 16
_OPERATORS = ((vision, "roi_patch_embed"), (perception, "control_cross_attention_into"), (language, "append_visual_kv_"))


@dataclass(frozen=True)
class Result:
    """One question and what the model did. path: of `PATHS`. looked: "region", "clip" or None."""

    question: Question
    path: str
    text: str
    looked: str | None
    boxes: tuple[tuple[int, int, int, int], ...]
    ids: tuple[int, ...]

    @property
    def right(self) -> bool:
        return self.text == self.question.answer

    @property
    def right_path(self) -> bool:
        """Whether the model looked again exactly where and how the question needs it."""
        wanted = None if self.question.look is None else self.question.look.partition(":")[0]
        return self.looked == wanted


@dataclass(frozen=True)
class Score:
    """Shares of right answers and right paths among `count` questions."""

    count: int
    right: float
    right_path: float


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Run the model's operators by `backend` ("auto" leaves the choice to them)."""
    with ExitStack() as stack:
        for module, name in _OPERATORS:
            stack.enter_context(patch.object(module, name, partial(getattr(module, name), backend=backend)))
        yield


def examples(kind: str, count: int, first: int = 0) -> Iterator[tuple[Scene, Question]]:
    """Test scenes number `first`, `first` + 1, … each with its one question of `kind`."""
    for seed in range(first, first + count):
        scene = make_scene(seed, "test")
        yield scene, make_question(scene, kind, seed)


def evaluate(
    engine: Engine,
    kind: str,
    path: str,
    count: int,
    *,
    first: int = 0,
    batch: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """Ask `count` questions of `kind` by `path`; `progress` is told how many are done.

    engine: one of vpt-mini; its own prompt is left alone. Raises ValueError for an unknown path.
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; it must be one of {', '.join(PATHS)}")
    results: list[Result] = []
    pending: list[tuple[Scene, Question]] = []
    own = engine.prompt
    try:
        engine.prompt = replace(own, trigger=_trigger(kind, path))
        for example in examples(kind, count, first):
            pending.append(example)
            if len(pending) == batch or len(results) + len(pending) == count:
                images, questions = zip(*((scene.pixels, question.text) for scene, question in pending))
                answers = engine.ask_batch(images, questions, max_new_tokens=MAX_NEW_TOKENS)
                results += [_result(q, path, a) for (_, q), a in zip(pending, answers, strict=True)]
                pending.clear()
                progress(len(results))
    finally:
        engine.prompt = own
    return results


def score(results: Sequence[Result]) -> Score:
    count = len(results)
    return Score(count, sum(r.right for r in results) / count, sum(r.right_path for r in results) / count)


def _trigger(kind: str, path: str) -> str | None:
    if path == "always look":
        return LOOK_TRIGGERS["region" if kind in ("tag", "two tags") else "clip"]
    return DIRECT_TRIGGER if path == "direct" else PromptFormat().trigger


def _result(question: Question, path: str, answer: Answer) -> Result:
    look = answer.looks[0] if answer.looks else None
    boxes = () if look is None else look.boxes
    return Result(question, path, answer.text, look and look.kind, tuple(boxes), tuple(answer.ids))


class Controlled(Engine):
    """Re-encodes under another control state: "zero" conditions nothing, "another's" is the question before this one's.

    The action token's embedding stays the true one: only the projector is told otherwise.
    """

    def __init__(self, *arguments, control: str, **options) -> None:
        if control not in CONTROLS:
            raise ValueError(f"control is {control!r}; it must be one of {', '.join(CONTROLS)}")
        super().__init__(*arguments, **options)
        self.control, self._last = control, None

    def condition(self, control: Tensor) -> Tensor:
        """The control state that the projector gets."""
        previous, self._last = self._last, control.clone()
        if self.control == "another's" and previous is not None:
            return previous
        return control


def agreement(a: Sequence[Result], b: Sequence[Result]) -> float:
    """Share of questions whose answers have the same tokens."""
    return sum(x.ids == y.ids for x, y in zip(a, b, strict=True)) / len(a)


def questions() -> tuple[str, ...]:
    return KINDS


__all__ = ["Controlled", "Result", "Score", "agreement", "evaluate", "examples", "score", "using", "torch"]
