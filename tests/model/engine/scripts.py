"""Conversations in which the tests say what the model generates, allowed as a forced look or not; and watchers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from unittest import mock

import torch

from vpt_model.engine import Engine
from vpt_model.engine.conversation import Question
from vpt_model.engine.events import Answer, Done, Event
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import Output, Request


class Wrapped:
    """An executor around another one; the tests' ways to change what is run or to watch it derive from it."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        return self.executor.run(requests)


class Fed(Wrapped):
    """Remembers the tokens that are fed, in order."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.tokens: list[int] = []

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        for request in requests:
            if getattr(request, "control", None) is None:  # else they were counted when the trigger was fed
                self.tokens += request.tokens
        return super().run(requests)


class Steps:
    """Counts the calls of the language model outside the steps, and the buckets of those inside."""

    def __init__(self, engine: Engine) -> None:
        self.eager, self.buckets = [], []
        language, graphs = engine.model.language, engine.executor.graphs
        self.patches = [
            mock.patch.object(language, "forward", self.noting(self.eager, language.forward, lambda *a: list(a[3]))),
            *(
                mock.patch.object(step, "run", self.noting(self.buckets, step.run, lambda step=step: step.bucket))
                for step in graphs.named().values()
            ),
        ]

    @staticmethod
    def noting(into, function, what):
        return lambda *arguments: into.append(what(*arguments)) or function(*arguments)

    def __enter__(self) -> Steps:
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()


def scripted(
    engine: Engine, question: str, image: torch.Tensor | None, rounds: Sequence[Sequence[int]], **options
) -> Answer:
    """The answer when the tokens of `rounds` are generated first; options as of `Question`."""
    return answer_of(engine, question_of(engine, question, image, rounds, **options))


def question_of(
    engine: Engine, question: str, image: torch.Tensor | None, rounds: Sequence[Sequence[int]], **options
) -> Question:
    asked = engine.question(image, question)
    asked.forced = deque(rounds)
    for name, value in options.items():
        setattr(asked, name, value)
    return asked


def answer_of(engine: Engine, question: Question) -> Answer:
    *_, done = events_of(engine, question)
    return done.answer


def events_of(engine: Engine, question: Question) -> list[Event]:
    return [event for _, event in engine.events([question])]


def answers_of(engine: Engine, questions: Sequence[Question]) -> list[Answer]:
    """Of rows that run side by side."""
    answers = {row: event.answer for row, event in engine.events(questions) if isinstance(event, Done)}
    return [answers[row] for row in range(len(questions))]
