"""What a stream reports, in order, and what an answer holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the original image; right and bottom exclusive."""


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is what it completes: characters of several tokens arrive with their last one."""

    id: int
    text: str


@dataclass(frozen=True)
class Region:
    """The model named regions of the image; their crops are what it looks at next."""

    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Reencode:
    """The model asked for the image to be encoded again; `kind` is the re-encoder: "clip", "dino" or "sam"."""

    kind: str


@dataclass(frozen=True)
class Look:
    """A second look that the model has now seen.

    kind: "region" or the re-encoder's name. boxes: the crops; empty for re-encoding. grids: (height, width) in patches
    of each image. tokens: visual tokens. appended: all tokens of the chunk that carried them.
    """

    kind: str
    boxes: tuple[Box, ...]
    grids: tuple[tuple[int, int], ...]
    tokens: int
    appended: int


@dataclass(frozen=True)
class Stage:
    """The wall-clock time of one stage, and counts of its work: "tokens", "lm_calls", "patches" and others."""

    name: str
    milliseconds: float
    work: dict[str, int]


@dataclass(frozen=True)
class Answer:
    """The end of a conversation.

    text: the answer without special tokens. ids: its tokens as generated, with the stop token if one ended it.
    first_text: what the first round printed; the same answer if there was no second look.
    finish_reason: "stop"; "length" (max_new_tokens); "capacity" (the cache is full or a look did not fit); "looks" (the
    answer names regions, but max_looks are taken); "nan" (the logits are not numbers, so no token followed).
    notices: why a look that the model asked for was not taken, or what is wrong with the logits. logits: float32
    [len(ids), vocab] when asked for, row k the one that ids[k] was taken from.
    """

    text: str
    ids: list[int]
    first_text: str
    finish_reason: str
    looks: list[Look] = field(default_factory=list)
    timings: list[Stage] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    logits: Tensor | None = None


@dataclass(frozen=True)
class Done:
    """The last event."""

    answer: Answer


Event = Token | Region | Reencode | Look | Done


def last_answer(events: Iterable[Event]) -> Answer:
    """Return the answer with which a stream of events ends."""
    *_, done = events
    assert isinstance(done, Done), "the last event of a stream is Done"
    return done.answer


class Clock:
    """Times stages; consecutive ones of the same name become one.

    On a GPU a stage is the time between two events of its stream, which nobody waits for until the times are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timed: list[tuple[str, Callable[[], float], dict[str, int]]] = []

    @contextmanager
    def __call__(self, name: str, **work: int) -> Iterator[None]:
        elapsed = _on_stream(self._device) if self._device.type == "cuda" else _on_host()
        yield
        self._timed.append((name, elapsed(), work))

    @property
    def stages(self) -> list[Stage]:
        """All stages that have ended, in order; on a GPU this waits for the last one."""
        stages: list[Stage] = []
        for name, milliseconds, work in self._timed:
            took = milliseconds()
            if stages and stages[-1].name == name:
                last = stages.pop()
                took += last.milliseconds
                work = {key: last.work.get(key, 0) + work.get(key, 0) for key in last.work | work}
            stages.append(Stage(name, took, work))
        return stages


def _on_host() -> Callable[[], Callable[[], float]]:
    """Begin a measurement; the function that is returned ends it and gives what will say its milliseconds."""
    start = time.perf_counter()

    def end() -> Callable[[], float]:
        milliseconds = (time.perf_counter() - start) * 1e3
        return lambda: milliseconds

    return end


def _on_stream(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Time as `_on_host` does, between events of the device's current stream: what runs ahead on another one is not in
    it.
    """
    start = torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream(device))

    def end() -> Callable[[], float]:
        stop = torch.cuda.Event(enable_timing=True)
        stop.record(torch.cuda.current_stream(device))

        @cache
        def milliseconds() -> float:
            if not stop.query():
                stop.synchronize()
            return start.elapsed_time(stop)

        return milliseconds

    return end
