"""What is asked of the engine for a visitor, and what they are told while it is answered."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from vpt_kernels import RegionPolicy
from vpt_model.app.page.line import Job, Message
from vpt_model.app.page.pictures import Picture, data_url
from vpt_model.app.page.sessions import Branch, Turn
from vpt_model.app.seen import Seen, Watched, conditioning_map, fed, named_cells, reencoded, tinted
from vpt_model.config import ModelConfig
from vpt_model.engine import Chat, Engine
from vpt_model.engine.events import Answer, Done, Event, Look, Reencode, Region, Stage, Token
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
        self.engine.executor = self.watched = Watched(model, self.engine.executor)
        direct = PromptFormat(trigger=DIRECT_TRIGGER)
        self.blind = Engine(model, tokenizer, capacity=capacity, max_looks=0, prompt=direct)
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
        chat = branch.chat if asked.remember else None
        shown = branch.shown if chat else []
        new = self.engine.chat() if chat is None else None
        chat = chat or new
        remembered = len(chat)
        job.tell({"event": "started", "remembered": remembered, "tokens": chat.length})
        if asked.picture is not None and not any(picture is asked.picture for picture in shown):
            job.tell(partial(_first, asked.picture, self.engine.policy))
        try:
            turn = self._turn(job, chat, shown, asked, remembered)
        except BaseException:
            if new is not None:
                new.close()
            raise
        pictures = len(chat.conversation.pictures)
        now_shown = [*shown, asked.picture][:pictures] if len(shown) < pictures else shown
        branch.replace_chat(chat, now_shown)
        branch.turns.append(turn)
        job.tell({"event": "done", "turn": turn.as_json(), "length": chat.length, "capacity": self.engine.capacity})

    def _turn(self, job: Job, chat: Chat, shown: list[Picture], asked: Asked, remembered: int) -> Turn:
        self.watched.take()
        watch = Watch(job, self.engine, asked.picture, self.watched, tells=True)
        image: Any = None
        if asked.picture is not None:
            known = [index for index, picture in enumerate(shown) if picture is asked.picture]
            image = known[-1] if known else asked.picture.pixels
        options = {"looks": asked.looks, "max_new_tokens": asked.tokens}
        with closing(chat.stream(asked.question, image, **options)) as events:
            answer = watch.follow(events, lambda: chat.conversation.clock.stages)
        times = watch.milliseconds, watch.second_look
        return Turn(asked.question, asked.picture, asked.looks, answer, watch.scores, *times, remembered)

    def compare(self, job: Job, turn: Turn, tokens: int) -> None:
        """Ask a turn's question by itself: with the look, without one, and by the published procedure."""
        assert turn.picture is not None, "only questions about pictures are compared"
        options = {"max_new_tokens": tokens}
        ways: dict[str, Callable[[], Message]] = {
            "second look": partial(self._timed, job, self.engine, turn, looks=turn.looks, **options),
            "one look": partial(self._timed, job, self.blind, turn, **options),
            "published": partial(self._by_the_book, job, turn, tokens),
        }
        for name, way in ways.items():
            job.begin()
            job.tell({"event": "comparing", "way": name})
            outcome = way()
            right = {} if turn.truth is None else {"right": outcome["text"] == turn.truth}
            job.tell({"event": "compared", "way": name, **outcome, **right})

    def _timed(self, job: Job, engine: Engine, turn: Turn, **options: Any) -> Message:
        watch = Watch(job, engine, turn.picture, self.watched, tells=False)
        with closing(engine.stream(turn.picture.pixels, turn.question, **options)) as events:
            answer = watch.follow(events, list)
        return _outcome(answer.text, watch.milliseconds, watch.second_look, answer.timings)

    def _by_the_book(self, job: Job, turn: Turn, tokens: int) -> Message:
        published = self.published
        job.begin()  # the weights may just have been read
        published.check = job.check
        start = time.perf_counter()
        image = Image.fromarray(turn.picture.pixels.numpy())
        answer = published.ask(image, turn.question, looks=turn.looks, max_new_tokens=tokens)
        milliseconds = (time.perf_counter() - start) * 1e3
        text = answer.text.removeprefix(ANSWER_PREFIX)
        return _outcome(text, milliseconds, answer.second_look_ms, answer.timings)


def _outcome(text: str, milliseconds: float, second_look: float | None, stages: Sequence[Any]) -> Message:
    return {"text": text, "milliseconds": milliseconds, "second_look_ms": second_look, "stages": told(stages)}


def told(stages: Sequence[Any]) -> list[Message]:
    """Stages of either procedure as plain values."""
    return [{"stage": s.name, "milliseconds": s.milliseconds, "work": dict(s.work)} for s in stages]


class Stoppable(PublishedProcedure):
    """The published procedure, which `check` can end between two tokens by raising an exception."""

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
        """Until the answer. stages: those of the clock, which grow. Raises `Stopped` between two events."""
        start = time.perf_counter()
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
        tell = self.job.tell
        if isinstance(event, Token):
            self._said += event.text
            for message in self._spoken(event.text):
                tell(message | {"round": self._round} | when)
        elif isinstance(event, Region):
            width, height = self.picture.size
            regions = [r for r in parse_regions(self._said) if r.columns and r.rows]
            cells = [named_cells(region, width, height) for region in regions[-len(event.boxes) :]]
            tell({"event": "region", "boxes": event.boxes, "cells": cells} | when)
            for number, box in enumerate(event.boxes):
                tell(partial(_crop, self.picture, number, box, self.engine.policy))
        elif isinstance(event, Reencode):
            tell({"event": "reencode", "kind": event.kind} | when)
        elif isinstance(event, Look):
            self._round, self._said = self._round + 1, ""
            shown = {"kind": event.kind, "tokens": event.tokens, "appended": event.appended}
            tell({"event": "look", **shown} | when)
            if event.kind != "region":
                self.scores += self.watched.take()
                tell(partial(_map, self.engine, self.picture, self.scores[-1], event))

    def _spoken(self, text: str) -> Iterator[Message]:
        """Text and perception tokens apart; the sentence that models learned to print before an answer is left out."""
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


def _crop(picture: Picture, number: int, box: Sequence[int], policy: RegionPolicy) -> Message:
    seen = fed(picture.pixels, tuple(box), policy)
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
