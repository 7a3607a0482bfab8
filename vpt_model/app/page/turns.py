"""What is asked of the engine for a visitor, and what they are told while it is answered."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from PIL import Image
from torch import Tensor

from vpt_kernels import RegionPolicy
from vpt_model.app.page.line import Job, Message
from vpt_model.app.page.pictures import Picture, data_url
from vpt_model.app.page.sessions import Branch, Turn
from vpt_model.app.seen import Seen, Watched, conditioning_map, fed, named_cells, reencoded, tinted
from vpt_model.config import ModelConfig
from vpt_model.engine import Chat, Engine
from vpt_model.engine.events import Answer, Box, Done, Event, Look, Reencode, Region, Stage, Token
from vpt_model.engine.requests import Output, Request
from vpt_model.mini.vocabulary import DIRECT_TRIGGER
from vpt_model.network.model import Model
from vpt_model.published.procedure import PublishedProcedure
from vpt_model.text.prompt import ANSWER_PREFIX, PromptFormat
from vpt_model.text.tokens import Tokenizer, parse_regions

State = Callable[[], tuple[ModelConfig, dict[str, Tensor]]]
_PERCEPTION = re.compile(r"<\|([^|>]+)\|>")


@dataclass(frozen=True)
class Asked:
    """One question. looks: forced ones; None leaves them to the model. remember: go on behind what was said."""

    question: str
    picture: Picture | None
    looks: Sequence[str] | None
    remember: bool
    tokens: int


class Answerer:
    """The model and the ways in which it is asked. state: the weights once more, as the published procedure has them.

    Used by one thread at a time.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, state: State) -> None:
        capacity = min(8192, model.config.max_position_embeddings)
        self.engine = Engine(model, tokenizer, capacity=capacity)
        self.warmed = self.engine.warm_up()
        self.engine.executor = self.watched = Stepwise(model, self.engine.executor)
        direct = PromptFormat(trigger=DIRECT_TRIGGER)
        self.blind = Engine(model, tokenizer, capacity=capacity, max_looks=0, prompt=direct)
        self.blind.executor = self._blind_steps = Stepwise(model, self.blind.executor)
        self._state = state
        self._published: Stoppable | None = None

    @property
    def published(self) -> Stoppable:
        """The published procedure, which takes memory for the weights once it is wanted."""
        if self._published is None:
            config, state = self._state()
            tokenizer = self.engine.tokenizer
            self._published = Stoppable(config, state, tokenizer.ids, tokenizer)
        return self._published

    def answer(self, job: Job, branch: Branch, asked: Asked) -> None:
        """Ask in a branch, which holds the turn afterwards; stopped or failed, it has not happened."""
        kept = branch.chat if asked.remember else None
        chat, shown = (self.engine.chat(), []) if kept is None else (kept, branch.shown)
        remembered = len(chat)
        job.tell({"event": "started", "remembered": remembered, "tokens": chat.length})
        if asked.picture is not None and not any(picture is asked.picture for picture in shown):
            job.tell(partial(_first, asked.picture, self.engine.policy))
        try:
            with checked(job, self.watched):
                turn = self._turn(job, chat, shown, asked, remembered)
        except BaseException:
            if kept is None:
                chat.close()
            raise
        if asked.picture is not None and len(chat.conversation.pictures) > len(shown):
            shown = [*shown, asked.picture]
        branch.replace_chat(chat, shown)
        branch.turns.append(turn)
        job.tell({"event": "done", "turn": turn.as_json(), "length": chat.length, "capacity": self.engine.capacity})

    def _turn(self, job: Job, chat: Chat, shown: list[Picture], asked: Asked, remembered: int) -> Turn:
        self.watched.take()
        watch = Watch(job, self.engine, asked.picture, self.watched, tells=True)
        image: Any = None
        if asked.picture is not None:
            known = [index for index, picture in enumerate(shown) if picture is asked.picture]
            image = known[-1] if known else asked.picture.pixels
        events = chat.stream(asked.question, image, looks=asked.looks, max_new_tokens=asked.tokens)
        answer = watch.follow(events, lambda: chat.conversation.clock.stages)
        times = watch.milliseconds, watch.second_look
        return Turn(asked.question, asked.picture, asked.looks, answer, watch.scores, *times, remembered)

    def compare(self, job: Job, turn: Turn, tokens: int) -> None:
        """Ask a turn's question by itself: with the look, without one, and by the published procedure."""
        picture = turn.picture
        assert picture is not None, "only questions about pictures are compared"
        asked = Asked(turn.question, picture, turn.looks, False, tokens)
        stoppable = self.watched, self._blind_steps, self.published
        ways: dict[str, Callable[[], Message]] = {
            "second look": partial(self._timed, job, self.engine, picture, asked, turn.looks),
            "one look": partial(self._timed, job, self.blind, picture, asked),
            "published": partial(self._by_the_book, job, picture, asked),
        }
        for name, way in ways.items():
            job.begin()
            job.tell({"event": "comparing", "way": name})
            with checked(job, *stoppable):
                outcome = way()
            right = {} if turn.truth is None else {"right": outcome["text"] == turn.truth}
            job.tell({"event": "compared", "way": name, **outcome, **right})

    def _timed(
        self, job: Job, engine: Engine, picture: Picture, asked: Asked, looks: Sequence[str] | None = None
    ) -> Message:
        watch = Watch(job, engine, picture, self.watched, tells=False)
        events = engine.stream(picture.pixels, asked.question, looks=looks, max_new_tokens=asked.tokens)
        answer = watch.follow(events, list)
        return _outcome(answer.text, watch.milliseconds, watch.second_look, answer.timings)

    def _by_the_book(self, job: Job, picture: Picture, asked: Asked) -> Message:
        start = time.perf_counter()
        image = Image.fromarray(picture.pixels.numpy())
        answer = self.published.ask(image, asked.question, looks=asked.looks, max_new_tokens=asked.tokens)
        milliseconds = (time.perf_counter() - start) * 1e3
        text = answer.text.removeprefix(ANSWER_PREFIX)
        return _outcome(text, milliseconds, answer.second_look_ms, answer.timings)


def _outcome(text: str, milliseconds: float, second_look: float | None, stages: Sequence[Any]) -> Message:
    return {"text": text, "milliseconds": milliseconds, "second_look_ms": second_look, "stages": told(stages)}


def told(stages: Sequence[Any]) -> list[Message]:
    """Return the stages of either procedure as plain values."""
    return [{"stage": s.name, "milliseconds": s.milliseconds, "work": dict(s.work)} for s in stages]


@contextmanager
def checked(job: Job, *stoppable: Stepwise | Stoppable) -> Iterator[None]:
    """Let a job end these before every step."""
    for each in stoppable:
        each.check = job.check
    try:
        yield
    finally:
        for each in stoppable:
            del each.check


class Stepwise(Watched):
    """An executor that `check` can end before every step by raising an exception."""

    check: Callable[[], None] = staticmethod(lambda: None)

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        self.check()
        return super().run(requests)


class Stoppable(PublishedProcedure):
    """The published procedure, which `check` can end before every step by raising an exception."""

    check: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        self.check()
        return super().forward(*inputs, **options)


class Watch:
    """Follows one answer about a picture, and, where it `tells`, informs its visitor of every event.

    milliseconds: that it took. second_look: from the perception token to the first answer token, of the last look.
    scores: of its re-encodings.
    """

    def __init__(self, job: Job, engine: Engine, picture: Picture | None, watched: Watched, tells: bool) -> None:
        self.job, self.engine, self.picture, self.watched, self.tells = job, engine, picture, watched, tells
        self.milliseconds = 0.0
        self.second_look: float | None = None
        self.scores: list[Tensor] = []
        self._said, self._round = "", 1
        self._held: str | None = ""
        self._triggered, self._looked = 0.0, False

    def follow(self, events: Iterator[Event], stages: Callable[[], Sequence[Stage]]) -> Answer:
        """Follow the events until the answer. stages: those of the clock, which grow. Raises `Stopped` between two
        events.
        """
        start = time.perf_counter()
        with closing(cast("Generator[Event, None, None]", events)):
            for event in events:
                now = (time.perf_counter() - start) * 1e3
                self.job.check()
                if isinstance(event, Done):
                    self.milliseconds = now
                    return event.answer
                self._time(event, now)
                if self.tells:
                    self._tell(event, {"at": now, "stages": told(stages())})
        raise RuntimeError("the stream ended without an answer")

    def _time(self, event: Event, now: float) -> None:
        triggers = (self.engine.ids.region_end, self.engine.ids.action_start)
        if isinstance(event, Token) and self._looked:
            self.second_look, self._looked = now - self._triggered, False
        elif isinstance(event, Token) and event.id in triggers:
            self._triggered = now
        elif isinstance(event, Look):
            self._looked = True

    def _tell(self, event: Event, when: Message) -> None:
        tell, picture = self.job.tell, self.picture
        if isinstance(event, Token):
            self._said += event.text
            for message in self._spoken(event.text):
                tell(message | {"round": self._round} | when)
            return
        assert picture is not None, "looks are at a picture"
        if isinstance(event, Region):
            width, height = picture.size
            regions = [r for r in parse_regions(self._said) if r.columns and r.rows]
            cells = [named_cells(region, width, height) for region in regions[-len(event.boxes) :]]
            tell({"event": "region", "boxes": event.boxes, "cells": cells} | when)
            for number, box in enumerate(event.boxes):
                tell(partial(_crop, picture, number, box, self.engine.policy))
        elif isinstance(event, Reencode):
            tell({"event": "reencode", "kind": event.kind} | when)
        elif isinstance(event, Look):
            self._round, self._said = self._round + 1, ""
            shown = {"kind": event.kind, "tokens": event.tokens, "appended": event.appended}
            tell({"event": "look", **shown} | when)
            if event.kind != "region":
                self.scores += self.watched.take()
                tell(partial(_map, self.engine, picture, self.scores[-1], event))

    def _spoken(self, text: str) -> Iterator[Message]:
        """Yield text and perception tokens apart, without the sentence that models print before an answer."""
        if self._round > 1 and self._held is not None:
            self._held += text
            if ANSWER_PREFIX.startswith(self._held) and self._held != ANSWER_PREFIX:
                text = ""
            else:
                text, self._held = self._held.removeprefix(ANSWER_PREFIX), None
        for index, part in enumerate(_PERCEPTION.split(text)):
            if index % 2:
                yield {"event": "token", "text": "", "perception": part}
            elif part or not text:
                yield {"event": "token", "text": part}


def _first(picture: Picture, policy: RegionPolicy) -> Message:
    return {"event": "first"} | _image(fed(picture.pixels, None, policy))


def _crop(picture: Picture, number: int, box: Box, policy: RegionPolicy) -> Message:
    seen = fed(picture.pixels, box, policy)
    return {"event": "crop", "number": number, "box": box} | _image(seen)


def _map(engine: Engine, picture: Picture, scores: Tensor, look: Look) -> Message:
    values = conditioning_map(scores, look)
    seen = reencoded(engine.model, picture.pixels, engine.policy)
    shown = {"low": float(values.min()), "high": float(values.max()), "values": values.round(3).tolist()}
    return {"event": "map", "map": data_url(Image.fromarray(tinted(values))), **shown} | _image(seen)


def _image(seen: Seen) -> Message:
    height, width, _ = seen.pixels.shape
    known = {"width": width, "height": height, "patch": seen.patch, "merge": seen.merge, "visual_tokens": seen.tokens}
    return {"image": data_url(Image.fromarray(seen.pixels)), **known}
