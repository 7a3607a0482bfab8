"""What `vpt demo` tells of one picture: a question of every kind, how vpt-mini went about it, and the truth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from vpt_model.engine import Engine
from vpt_model.engine.events import Answer, Box, Done, Look, Region, Token
from vpt_model.mini.scenes import KINDS, Question, Scene, make_question


@dataclass(frozen=True)
class Moment:
    """Something that happened, milliseconds after the question was asked."""

    milliseconds: float
    what: str


@dataclass(frozen=True)
class Chapter:
    """One question and its answer, the path freely chosen. said: the first round's text. boxes: the crops shown."""

    question: Question
    answer: Answer
    said: str
    boxes: tuple[Box, ...]
    moments: list[Moment]

    @property
    def right(self) -> bool:
        return self.answer.text == self.question.answer


def tell(engine: Engine, scene: Scene, seed: int) -> Iterator[Chapter]:
    """Yield a chapter for every kind of question about the scene."""
    for kind in KINDS:
        yield _chapter(engine, scene, make_question(scene, kind, seed))


def _chapter(engine: Engine, scene: Scene, question: Question) -> Chapter:
    start, moments, said = time.perf_counter(), list[Moment](), ""
    boxes: tuple[Box, ...] = ()

    def note(what: str) -> None:
        moments.append(Moment((time.perf_counter() - start) * 1e3, what))

    for event in engine.stream(scene.pixels, question.text, max_new_tokens=16):
        if isinstance(event, Token):
            if not moments or not moments[-1].what.startswith("says "):
                note("says ")
            moments[-1] = Moment(moments[-1].milliseconds, moments[-1].what + event.text)
        elif isinstance(event, Region):
            boxes = event.boxes
        elif isinstance(event, Look):
            note(f"looks again: {event.tokens} visual tokens, {event.appended} tokens appended")
        elif isinstance(event, Done):
            note("done")
            said = event.answer.first_text
            return Chapter(question, event.answer, said, boxes, moments)
    raise RuntimeError("the stream ended without an answer")
