"""What runs requests: caches are advanced here alone, and but for a step ahead (`decoding`) all tokens pass here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vpt_model.engine import perception
from vpt_model.engine.decoding import Decoding
from vpt_model.engine.graphs import Bucket, Graphs, Step, smallest
from vpt_model.engine.looks import Look, Looks
from vpt_model.engine.requests import Append, CropAndAppend, Decode, Output, ReencodeAndAppend, Request
from vpt_model.network.capture import on_device, uploaded
from vpt_model.network.model import Model

_log = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs requests of different conversations together."""

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        """Return what came of each request, in order, or what is left of it, to be run with the next ones.

        Raises ValueError, before anything is written, if the tokens do not fit into a cache.
        """
        ...


@dataclass(frozen=True)
class Fed:
    """What the language model says behind the last token that was fed: state [1, H], logits [vocab], their argmax.

    chosen: the sampler's choice, where it has been made; −1 where it cannot be. features: [n, H] of each region that
    was looked at on the way.
    """

    hidden: Tensor
    logits: Tensor | None = None
    argmax_token: Tensor | None = None
    chosen: int | None = None
    features: tuple[Tensor, ...] = ()


Feed = Callable[[Sequence[Append]], list[Fed]]
"""Runs the language model over the tokens of different conversations, which it writes to their caches."""
Prepare = Callable[[Request], tuple[Append, tuple[Tensor, ...]]]
"""Says which tokens a request feeds first, and the features of what it looked at before."""


class Eager:
    """Runs requests one operation at a time; images one by one, all tokens in one ragged call of the language model.

    speculate: on a GPU, begin the re-encoder's work beside the first round.
    """

    def __init__(self, model: Model, speculate: bool = False) -> None:
        self.model = model
        self.speculate = speculate and model.encoder is not None and model.device.type == "cuda"

    def run(
        self, requests: Sequence[Request], feed: Feed | None = None, prepare: Prepare | None = None
    ) -> list[Output | Request]:
        """Do what `Executor.run` says; feed and prepare stand in for `Eager.feed` and `Eager.prepare`."""
        # Whoever calls under autocast has its own model in mind.
        with ExitStack() as timers, torch.autocast(self.model.device.type, enabled=False):
            appends, features = [], []
            for request in requests:
                append, seen = (prepare or self.prepare)(request)
                timers.enter_context(append.timed())
                appends.append(append)
                features.append(seen)
            for append in appends:
                append.conversation.cache.check(len(append.tokens))
            fed = (feed or self.feed)(appends)
            for append in appends:
                append.conversation.advance(append.tokens, append.next_position)
            return [self._finish(*each) for each in zip(requests, appends, features, fed, strict=True)]

    def feed(self, appends: Sequence[Append]) -> list[Fed]:
        """Write the tokens of all conversations behind what their caches hold; what follows each one's last."""
        last = [states[-1:] for states in self.states(appends)]
        sampled = [state for append, state in zip(appends, last, strict=True) if append.logits]
        logits = iter(self.model.language.logits(torch.cat(sampled)) if sampled else ())
        return [Fed(state, next(logits) if a.logits else None) for a, state in zip(appends, last, strict=True)]

    def states(self, appends: Sequence[Append]) -> list[Tensor]:
        """Run every token through the language model, once; return hidden states [T_i, H]."""
        lengths = [len(append.tokens) for append in appends]
        caches = [append.conversation.cache for append in appends]
        embeds = torch.cat([self._embed(a.tokens) if a.embeds is None else a.embeds for a in appends])
        positions = torch.cat([append.positions for append in appends], dim=1)
        for cache, count in zip(caches, lengths, strict=True):
            cache.reserve(count)
        hidden = self.model.language.forward(embeds, positions, caches, lengths)
        return list(hidden.split(lengths))

    def prepare(self, request: Request) -> tuple[Append, tuple[Tensor, ...]]:
        """Return the tokens that a request feeds first, and the features of what it looked at before."""
        if isinstance(request, Append):
            return request, ()
        if isinstance(request, Decode):
            return decoded(request), ()
        if isinstance(request, CropAndAppend):
            return self._crop(request)
        return self._encode(request) if request.control is None else self._project(request, request.control)

    def _finish(self, request: Request, append: Append, features: tuple[Tensor, ...], fed: Fed) -> Output | Request:
        if isinstance(request, ReencodeAndAppend) and not append.logits:
            return replace(request, control=fed.hidden, features=features[0])
        sampler, logits, token = append.sampler, fed.logits, fed.chosen
        if token is None and sampler is not None and logits is not None:
            token = sampler(logits, fed.argmax_token)
        features = features or fed.features
        return Output(append.tokens[-1], fed.hidden, logits, None if token == -1 else token, features)

    def encode_ahead(self, request: Request) -> None:
        """Begin to re-encode a picture beside what follows, where it may be asked for and the engine shall."""
        if self.speculate and isinstance(request, CropAndAppend) and request.again:
            request.picture.ahead = perception.Ahead(self.model, request.picture.kept)

    def _crop(self, request: CropAndAppend) -> tuple[Append, tuple[Tensor, ...]]:
        picture = request.picture
        features = perception.look(self.model, picture.kept, request.plan, request.conversation.clock)
        self.encode_ahead(request)
        embeds = self._embed(request.tokens)
        pads = (torch.tensor(request.tokens, device="cpu") == request.pad).nonzero().flatten()
        embeds[uploaded(pads, embeds.device)] = torch.cat(features)
        return _append(request, request.tokens, request.positions, embeds, stage=request.stage), features

    def _encode(self, request: ReencodeAndAppend) -> tuple[Append, tuple[Tensor, ...]]:
        """Return the picture as the projector reads it, and the token whose state is the control."""
        picture = request.picture
        features = perception.reencode(
            self.model, picture.pixels, picture.seen, request.conversation.clock, picture.ahead
        )
        trigger, following = request.positions[:, :1], int(request.positions[0, 1])
        place = {"next_position": following, "logits": False, "sampler": None, "stage": "perceive"}
        return _append(request, request.tokens[:1], trigger, None, **place), (features,)

    def _project(self, request: ReencodeAndAppend, control: Tensor) -> tuple[Append, tuple[Tensor, ...]]:
        """Return the look itself: the control state in the action token's place, the re-encoded picture in the
        pads'.
        """
        assert request.features is not None, "they come with the control state"
        tokens = request.tokens[1:]
        first, count = tokens.index(request.pad), tokens.count(request.pad)
        with request.conversation.clock("perceive", features=count):
            embeds = self._embed(tokens)
            embeds[0] = control[0]
            perception.reencode_into(self.model, request.features, control, embeds, first, count)
        return _append(request, tokens, request.positions[:, 1:], embeds), ()

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self.model.language.embed(torch.tensor(tokens, device="cpu"))


def decoded(request: Decode) -> Append:
    """Return generated tokens as such that are appended."""
    begin = request.conversation.next_position
    end = begin + len(request.tokens)
    positions = torch.arange(begin, end, device="cpu").expand(3, -1)
    place = {"next_position": end, "ahead": request.ahead, "stage": "decode"}
    return _append(request, request.tokens, positions, request.embeds, **place)


def _append(request: Request, tokens: Sequence[int], positions: Tensor, embeds: Tensor | None, **other: Any) -> Append:
    same: dict[str, Any] = {"conversation": request.conversation, "sampler": request.sampler}
    if not isinstance(request, Decode):
        same["next_position"] = request.next_position
    return Append(tokens=tokens, positions=positions, embeds=embeds, **(same | other))


class Captured:
    """An executor around an eager one: it replays graphs for the tokens that fit their buckets.

    The other tokens, and everything that is no token, are left to the eager one. Conversations that decode share a
    bucket, each that appends has one of its own. A conversation whose cache lies outside the graphs' buffers, or in
    several parts because it is a fork or has grown, is never replayed, which is logged once.
    """

    def __init__(self, eager: Eager, graphs: Graphs) -> None:
        self.eager, self.graphs, self.decoding = eager, graphs, Decoding()
        self._told = False

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        return self.eager.run(requests, self.feed, self.prepare)

    def prepare(self, request: Request) -> tuple[Append, tuple[Tensor, ...]]:
        """Return what `Eager.prepare` does, or a look that two replays take."""
        look = Looks(self.eager.model, self.graphs).plan(request)
        if look is None:
            return self.eager.prepare(request)
        self.eager.encode_ahead(request)
        return look, ()

    def feed(self, appends: Sequence[Append]) -> list[Fed]:
        """Write tokens as `Eager.feed` does."""
        fed: dict[int, Fed] = {}
        for bucket, rows in self._buckets(appends):
            step, given = self.graphs.steps[bucket], [appends[row] for row in rows]
            if step.decodes:
                fed |= zip(rows, self._decode(step, given, alone=len(rows) == len(appends)), strict=True)
                continue
            self.decoding.forget(given)
            hidden, *sampled = step(given)
            for place, row in enumerate(rows):
                logits, argmax_token = (out[place] for out in sampled) if sampled else (None, None)
                fed[row] = Fed(hidden[place : place + 1], logits, argmax_token)
        fed |= {row: self._look(append) for row, append in enumerate(appends) if isinstance(append, Look)}
        left = [row for row in range(len(appends)) if row not in fed]
        if left:
            self.decoding.forget([appends[row] for row in left])
            fed |= zip(left, self.eager.feed([appends[row] for row in left]), strict=True)
        return [fed[row] for row in range(len(appends))]

    def _look(self, look: Look) -> Fed:
        self.decoding.forget([look])
        with on_device(self.graphs.given):
            (hidden, logits, argmax_token), features = look.launch()
        return Fed(hidden, logits[0], argmax_token[0], features=features)

    def _decode(self, step: Step, appends: Sequence[Append], alone: bool) -> list[Fed]:
        flight, tokens = self.decoding.feed(step, appends, alone)
        return [Fed(flight.hidden[row : row + 1], flight.logits[row], chosen=token) for row, token in enumerate(tokens)]

    def _buckets(self, appends: Sequence[Append]) -> Iterator[tuple[Bucket, list[int]]]:
        """Yield which rows are replayed together."""
        inside = [row for row, a in enumerate(appends) if a.conversation.cache.slab is self.graphs.slab]
        if len(inside) < len(appends) and not self._told:
            self._told = True
            _log.warning(
                "%d of %d conversations run without CUDA graphs: they are forks or live chats, or more than the %d "
                "whose caches the graphs know",
                len(appends) - len(inside),
                len(appends),
                len(self.graphs.caches),
            )
        inside = [row for row in inside if not isinstance(appends[row], Look)]
        decoding = [row for row in inside if len(appends[row].tokens) == 1 and appends[row].logits]
        widest = max((bucket.rows for bucket in self.graphs.steps if bucket.tokens == 1 and bucket.sample), default=0)
        groups = [decoding[begin : begin + widest] for begin in range(0, len(decoding), widest)] if widest else []
        groups += [[row] for row in inside if row not in decoding]
        for rows in groups:
            first, samplers = appends[rows[0]], (appends[row].sampler for row in rows)
            draw = rows[0] in decoding and not all(sampler is None or sampler.is_greedy for sampler in samplers)
            if bucket := smallest(self.graphs.steps, len(rows), len(first.tokens), first.logits, draw):
                yield bucket, rows
