"""How often vpt-mini is right on the test split: by kind of question, path, backend, dtype and control state.

Paths: "direct" asks for an answer from the first look and "always look" for a second one, each by the sentence that
training used for it; "free" leaves the choice to the model. The scenes have photographs and seeds of the test split,
of which training saw none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from vpt_model import mini
from vpt_model.checkpoint.load import moved
from vpt_model.engine import Engine, perception
from vpt_model.engine.events import Answer
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import Output, ReencodeAndAppend, Request
from vpt_model.mini.scenes import KINDS, Question, crop, make_question, make_scene
from vpt_model.mini.vocabulary import DIRECT_TRIGGER, LOOK_TRIGGERS
from vpt_model.network import attention, vision
from vpt_model.network.model import Model
from vpt_model.text.prompt import PromptFormat

CPU = torch.device("cpu")
PATHS = ("free", "always look", "direct")
CONTROLS = ("true", "zero", "another's")
"""Control states of a re-encoding: its own; none, k = 0; that of another question about another picture."""
READ = "read the crop"
"""A kind of question for comparison: the crop is the only image, so nothing needs to be found."""
MAX_NEW_TOKENS = 16
_OPERATORS = (
    (vision, "roi_patch_embed"),
    (perception, "control_cross_attention_into"),
    (attention, "append_visual_kv_"),
)


@dataclass(frozen=True)
class Result:
    """One question about one scene, and what the model did. looked: "region", "clip" or None."""

    question: Question
    ids: tuple[int, ...]
    text: str
    looked: str | None

    @property
    def right(self) -> bool:
        return self.text == self.question.answer

    @property
    def right_path(self) -> bool:
        """Whether the model looked again in the way that the question needs, or not at all where it needs no look."""
        look = self.question.look
        return self.looked == (look and look.partition(":")[0])


@dataclass(frozen=True)
class Score:
    """Shares of right answers and of right paths among `count` questions."""

    count: int
    right: float
    right_path: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> Score:
        count = len(results)
        return cls(count, sum(r.right for r in results) / count, sum(r.right_path for r in results) / count)


class BorrowedControl:
    """Re-encodes under the control state of the question before, which is about another picture."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._last: Tensor | None = None

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        return [
            replace(result, control=self._borrowed(result.control)) if isinstance(result, ReencodeAndAppend) else result
            for result in self.executor.run(requests)
        ]

    def _borrowed(self, control: Tensor | None) -> Tensor:
        assert control is not None, "whoever ran the re-encoding knows its control state"
        previous, self._last = self._last, control.clone()
        return self._last if previous is None else previous


Precision = torch.dtype | str


def make_engine(
    path: str,
    kind: str,
    dtype: Precision,
    control: str = "true",
    folder: Path = mini.FOLDER,
    device: torch.device = CPU,
) -> Engine:
    """Return vpt-mini, prompted to answer questions of `kind` by `path`.

    dtype: of the loaded weights, or the name of the precision in which the shipped ones are kept (`Model.from_state`).

    Raises ValueError for an unknown path or control.
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; it must be one of {', '.join(PATHS)}")
    if control not in CONTROLS:
        raise ValueError(f"control is {control!r}; it must be one of {', '.join(CONTROLS)}")
    looks = LOOK_TRIGGERS["region" if kind in ("tag", "two tags") else "clip"]
    trigger = {"free": None, "always look": looks, "direct": DIRECT_TRIGGER}[path]
    weights, dtype = (dtype, torch.float32) if isinstance(dtype, str) else ("auto", dtype)
    config, state, tokenizer = mini.load_state(dtype, folder)
    if control == "zero":
        for part in ("weight", "bias"):
            state[f"clip_projector.linear_condition.{part}"].zero_()
    model, prompt = Model.from_state(config, moved(state, device), weights), PromptFormat(trigger=trigger)
    engine = Engine(model, tokenizer, capacity=512, prompt=prompt)
    if control == "another's":
        engine.executor = BorrowedControl(engine.executor)
    return engine


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Run the model's operators by `backend`; "auto" leaves the choice to them."""
    with ExitStack() as stack:
        for module, name in _OPERATORS:
            stack.enter_context(patch.object(module, name, partial(getattr(module, name), backend=backend)))
        yield


def examples(kind: str, count: int, first: int = 0) -> Iterator[tuple[np.ndarray, Question]]:
    """Yield test pictures number `first`, `first` + 1, …, each with a question of `kind`.

    A question of READ comes with the crop to read in place of the picture.
    """
    for seed in range(first, first + count):
        scene = make_scene(seed, "test")
        question = make_question(scene, "tag" if kind == READ else kind, seed)
        if kind == READ:
            yield crop(scene, question.things[0]), replace(question, kind=READ, text="What is on the tag?", look=None)
        else:
            yield scene.pixels, question


def evaluate(
    engine: Engine, kind: str, count: int, batch: int = 16, progress: Callable[[int], None] = lambda done: None
) -> list[Result]:
    """Ask the first `count` questions of `kind`; `progress` is told how many more are done."""
    results: list[Result] = []
    for first in range(0, count, batch):
        pictures, questions = zip(*examples(kind, min(batch, count - first), first))
        answers = engine.ask_batch(pictures, [q.text for q in questions], max_new_tokens=MAX_NEW_TOKENS)
        results += map(_result, questions, answers)
        progress(len(answers))
    return results


def agreement(ours: Sequence[Result], theirs: Sequence[Result]) -> float:
    """Return the share of the questions that got the same tokens and the same look."""
    return sum((a.ids, a.looked) == (b.ids, b.looked) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _result(question: Question, answer: Answer) -> Result:
    return Result(question, tuple(answer.ids), answer.text, answer.looks[0].kind if answer.looks else None)


@dataclass(frozen=True)
class Line:
    """One line of the report. agreement: with the first backend and dtype, on the same questions by the same path."""

    backend: str
    dtype: str
    kind: str
    path: str
    control: str
    score: Score
    agreement: float | None = None


def plan(backends: Sequence[str], dtypes: Sequence[Precision]) -> list[tuple[str, Precision, str, str, str]]:
    """Return what `report` runs, in order: (backend, dtype, kind, path, control).

    Every path and control for the first backend and dtype; the others repeat the free choice.
    """
    wanted: list[tuple[str, Precision, str, str, str]] = []
    for backend in backends:
        for dtype in dtypes:
            paths = PATHS if not wanted else PATHS[:1]
            runs = [(backend, dtype, kind, path, "true") for path in paths for kind in KINDS]
            if not wanted:
                runs += [(backend, dtype, "count", "free", control) for control in CONTROLS[1:]]
                runs.append((backend, dtype, READ, "free", "true"))
            wanted += runs
    return wanted


def report(
    backends: Sequence[str],
    dtypes: Sequence[Precision],
    count: int,
    folder: Path = mini.FOLDER,
    progress: Callable[[int], None] = lambda done: None,
    device: torch.device = CPU,
) -> Iterator[Line]:
    """Yield the lines of `plan`, of `count` questions each, as they are done on `device`."""
    first: dict[str, list[Result]] = {}
    for backend, dtype, kind, path, control in plan(backends, dtypes):
        with using(backend):
            engine = make_engine(path, kind, dtype, control, folder, device)
            results = evaluate(engine, kind, count, progress=progress)
        same = None
        if kind != READ and (path, control) == ("free", "true"):
            same = agreement(first[kind], results) if kind in first else None
            first.setdefault(kind, results)
        name = str(dtype).removeprefix("torch.")
        yield Line(backend, name, kind, path, control, Score.of(results), same)
