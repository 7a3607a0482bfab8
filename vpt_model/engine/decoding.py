"""Decoding a step ahead: while the host waits for one token, the device already feeds it.

    host     replay n ─ replay n + 1 ─ wait for token n ─ next request: replay n + 2 ─ wait for token n + 1 ─ …
    device   [ step n  ][ step n + 1 ]                  [ step n + 2 ]

A decode step chooses what follows and leaves its bucket's integers as the next one needs them (`StepMetadata.follow`),
so that the next replay takes nothing from the host: of a row that is sampled the draws of `DRAWS` tokens go to the
device with the first one. If the token that the host then reads ends the round, one step was too much: what it wrote
lies behind the tokens that the cache counts, where nothing is read before it is overwritten, and its draw is not spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from vpt_model.engine.conversation import Conversation
from vpt_model.engine.graphs import Step
from vpt_model.engine.requests import Append
from vpt_model.engine.sampling import DRAWS, Sampler
from vpt_model.network.capture import on_device


class _Row(NamedTuple):
    """What was fed: the `length`-th token of a conversation. sampler: has chosen the one that follows, if any."""

    conversation: ref[Conversation]
    length: int
    sampler: Sampler | None


@dataclass(eq=False)
class Flight:
    """One decode step that was launched.

    rows: of the bucket; the others are padding. hidden: [R, H]. logits: [R, vocab]. chosen: int64 [R], what follows, −1
    where that cannot be said; on a GPU in pinned memory, where it is when `arrived` has come. number: of replays since
    the host gave the step its integers. fed: the tokens that were fed, once the host knows them.
    """

    rows: tuple[_Row, ...]
    hidden: Tensor
    logits: Tensor
    chosen: Tensor
    arrived: torch.cuda.Event | None
    number: int
    fed: tuple[int | None, ...] = ()

    def tokens(self) -> tuple[int | None, ...]:
        """Return what the sampler of each row has chosen; the one thing that the host waits for. Spends its draw."""
        samplers = [row.sampler for row in self.rows if row.sampler is not None]
        if not samplers:
            return (None,) * len(self.rows)
        for sampler in samplers:
            sampler.spend()
        if self.arrived is not None:
            self.arrived.synchronize()
        return tuple(None if row.sampler is None else token for row, token in zip(self.rows, self.chosen.tolist()))

    def feeds(self, appends: Sequence[Append]) -> bool:
        """Return whether the step did what these appends ask for."""
        return len(appends) == len(self.rows) and all(
            row.conversation() is append.conversation
            and row.length == append.conversation.length
            and row.sampler is append.sampler
            and append.embeds is None
            and list(append.tokens) == [token]
            for row, append, token in zip(self.rows, appends, self.fed, strict=True)
        )


class Decoding:
    """Runs decode steps, each before its token is asked for where `Append.ahead` lets it."""

    def __init__(self) -> None:
        self._ahead: WeakKeyDictionary[Conversation, Flight] = WeakKeyDictionary()
        self._last: Flight | None = None
        """The step whose integers lie on the device: only behind this one may another be launched."""

    def forget(self, appends: Sequence[Append]) -> None:
        """Forget what was launched for conversations of which something else is asked."""
        for append in appends:
            if (flight := self._ahead.pop(append.conversation, None)) is not None:
                self._take(flight)

    def feed(self, step: Step, appends: Sequence[Append], alone: bool) -> tuple[Flight, Sequence[int | None]]:
        """Feed one token of each conversation by a decode step.

        alone: whether nothing else is run in this turn, so that the same rows are likely to come again.

        Returns:
            What came of it, and the tokens that follow, None where no sampler chooses them.
        """
        flight = self._ahead.get(appends[0].conversation)
        if flight is None or not flight.feeds(appends):
            self.forget(appends)
            flight = self._launch(step(appends), [_row(append, 0) for append in appends], 0)
        else:
            self._take(flight)
        following = None
        number = flight.number + 1
        is_drawn_up_to_here = not step.bucket.draw or number < DRAWS
        if alone and flight is self._last and is_drawn_up_to_here and all(map(_may_go_on, appends)):
            following = self._launch(step.again(), [_row(append, 1) for append in appends], number)
        tokens = flight.tokens()
        if following is not None:
            following.fed = tokens
            self._ahead |= {append.conversation: following for append in appends}
        return flight, tokens

    def _launch(self, outputs: tuple[Tensor, ...], rows: list[_Row], number: int) -> Flight:
        hidden, logits, chosen = outputs
        with on_device(chosen):
            arrived, read = None, chosen
            if chosen.is_cuda and any(row.sampler is not None for row in rows):
                read = torch.empty(chosen.shape, dtype=chosen.dtype, device="cpu", pin_memory=True)
                read.copy_(chosen, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
        self._last = Flight(tuple(rows), hidden, logits, read, arrived, number)
        return self._last

    def _take(self, flight: Flight) -> None:
        for row in flight.rows:
            if (conversation := row.conversation()) is not None:
                self._ahead.pop(conversation, None)


def _row(append: Append, further: int) -> _Row:
    return _Row(ref(append.conversation), append.conversation.length + further, append.sampler)


def _may_go_on(append: Append) -> bool:
    """Return whether one more token can be fed behind this one before anyone has seen it."""
    cache = append.conversation.cache
    return append.ahead > 0 and append.sampler is not None and cache.length + 2 <= cache.capacity
