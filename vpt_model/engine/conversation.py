"""A conversation leases a cache and knows what lies in it; a question knows how it is to be answered, and how far."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vpt_model.engine.events import Answer, Clock, Look, Stage
from vpt_model.engine.sampling import Sampler
from vpt_model.network.cache import KVCache
from vpt_model.text.prompt import ANSWER_PREFIX
from vpt_model.text.tokens import TokenIds

FORK_ROWS = 256
"""Tokens for which a fork has room before it grows."""


class Mark(NamedTuple):
    """A place in a conversation to which it can go back: its tokens, position, pictures, and what was not fed there."""

    length: int
    next_position: int
    pictures: int
    unfed: tuple[int, ...]


@dataclass
class Picture:
    """An image that a conversation is shown.

    pixels: uint8 [height, width, 3] on the model's device; None once they are dropped. size: its height and width.
    features: [N, H] of its first look, once it is taken, and its grids in patches. ahead: returns what the re-encoder
    makes of it, where that was begun unasked. notices: what its owner should know, told in the answer of its first
    question.
    """

    pixels: Tensor | None
    size: tuple[int, int]
    features: Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()
    ahead: Callable[[], Tensor] | None = None
    notices: tuple[str, ...] = ()

    @property
    def kept(self) -> Tensor:
        """The pixels. Raises ValueError once they are dropped."""
        if self.pixels is None:
            raise ValueError("the picture's pixels were not kept: show it again, or use keep_pixels=True")
        return self.pixels

    @property
    def seen(self) -> Tensor:
        """The features of the first look. Raises ValueError before it is taken."""
        if self.features is None:
            raise ValueError("the picture has not been looked at: look at it first")
        return self.features

    @property
    def whole(self) -> tuple[int, int, int, int]:
        """The box of all pixels."""
        height, width = self.size
        return 0, 0, width, height

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels and features."""
        return sum(x.nbytes for x in (self.pixels, self.features) if x is not None)


class Lease:
    """A cache on loan: it is given back when neither its conversation nor a fork that reads it needs it any more."""

    def __init__(self, cache: KVCache, release: Callable[[KVCache], None], lenders: tuple[Lease, ...] = ()) -> None:
        self.cache, self.lenders = cache, lenders
        weakref.finalize(self, release, cache).atexit = False


class Conversation:
    """A leased cache, and what it holds; `close` ends the lease, and so does forgetting the conversation.

    release: takes the cache back. clock: times the stages of the question that is being answered. tokens: ids of all
    that was fed. unfed: what the last answer said and the cache does not hold yet. pictures: those shown, in order, of
    which the first `inherited` came from the conversation that this one was forked from.
    """

    def __init__(
        self, cache: KVCache, clock: Clock, release: Callable[[KVCache], None], lenders: tuple[Lease, ...] = ()
    ) -> None:
        self._lease: Lease | None = Lease(cache, release, lenders)
        self.clock = clock
        self.tokens: list[int] = []
        self.unfed: tuple[int, ...] = ()
        self.pictures: list[Picture] = []
        self.inherited = 0

    @property
    def cache(self) -> KVCache:
        """The cache. Raises ValueError if the conversation is closed."""
        if self._lease is None:
            raise ValueError("the conversation is closed and its memory given back: begin a new one")
        return self._lease.cache

    @property
    def length(self) -> int:
        """Tokens that have been fed."""
        return self.cache.length

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.cache.capacity

    @property
    def next_position(self) -> int:
        """M-RoPE position of the next text token, which is less than `length` behind an image."""
        return self.cache.next_position

    @property
    def closed(self) -> bool:
        """Whether the cache has been given back."""
        return self._lease is None

    def advance(self, tokens: Sequence[int], next_position: int) -> None:
        """Count tokens, whose keys and values have been written, as fed."""
        self.cache.advance(len(tokens), next_position)
        self.tokens += tokens

    def restore(self, tokens: Sequence[int], keys: Tensor, values: Tensor, mark: Mark) -> None:
        """Hold what another conversation of the same model held at `mark`, before anything is fed; its pictures aside.

        keys, values: of `KVCache.gather`. Raises ValueError if they do not fit.
        """
        self.cache.restore(keys, values, mark.next_position)
        self.tokens, self.unfed = list(tokens), mark.unfed

    def mark(self) -> Mark:
        """Return where the conversation is now."""
        return Mark(self.length, self.next_position, len(self.pictures), self.unfed)

    def truncate(self, mark: Mark) -> None:
        """Forget what was fed and shown behind `mark`. Raises ValueError if the conversation is shorter."""
        self.cache.truncate(mark.length, mark.next_position)
        for picture in self.pictures[mark.pictures :]:
            picture.features = picture.ahead = None  # it may be shown again
        self.inherited = min(self.inherited, mark.pictures)
        del self.tokens[mark.length :], self.pictures[mark.pictures :]
        self.unfed = mark.unfed

    def fork(self, rows: int = FORK_ROWS) -> Conversation:
        """Return a second conversation that begins behind this one's tokens, which it reads where they are.

        rows: tokens that its own buffer takes before it grows. Both go on independently.
        """
        own = self.cache.fork(min(rows, self.capacity))
        lenders = () if self._lease is None else (self._lease,)
        fork = Conversation(own, Clock(own.keys.device), _forget, lenders)
        fork.tokens, fork.unfed = list(self.tokens), self.unfed
        fork.pictures, fork.inherited = [replace(picture) for picture in self.pictures], len(self.pictures)
        return fork

    def close(self) -> None:
        """Give the memory back, as soon as no fork reads it; a closed conversation takes no further tokens."""
        self._lease = None
        self.pictures.clear()
        self.tokens.clear()


def _forget(cache: KVCache) -> None:
    """Do nothing with a fork's cache: its own buffers are freed with it."""


@dataclass
class Turn:
    """What the model generated in one round. `end`: a finish reason of `Answer`, or "action" (a look follows).

    begin: how many tokens had been fed before. forced: tokens that come first, whatever the model would choose.
    """

    begin: int
    forced: deque[int] = field(default_factory=deque)
    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    end: str = ""
    unprinted: list[int] = field(default_factory=list)

    def add(self, token: int, decode: Callable[[list[int]], str]) -> str:
        """Take a token; the text that it completes, which is empty where the end of a character may be missing."""
        self.ids.append(token)
        self.unprinted.append(token)
        text = decode(self.unprinted)
        if not self.end and text.endswith("\ufffd"):
            return ""
        self.unprinted.clear()
        return text

    def pending(self, conversation: Conversation) -> list[int]:
        """Return what was generated and not fed yet."""
        return self.ids[conversation.length - self.begin :]


@dataclass
class Question:
    """One question, the limits of its answer, and what has come of it.

    user: ids of its text. forced: what the next rounds begin with. max_new_tokens: per round; forced tokens are free.
    max_looks: second looks that this question may take. round_start: the place behind the current assistant header.
    """

    user: Sequence[int]
    picture: Picture | None = None
    forced: deque[list[int]] = field(default_factory=deque)
    sampler: Sampler = field(default_factory=Sampler)
    max_new_tokens: int = 64
    max_looks: int = 1
    keep_logits: bool = False
    round_start: Mark = Mark(0, 0, 0, ())
    turns: list[Turn] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def may_look(self) -> bool:
        """Whether there is a picture, and another look at it is allowed."""
        return self.picture is not None and len(self.looks) < self.max_looks

    @property
    def next_sampler(self) -> Sampler | None:
        """What chooses the first token of the next round; None if it is forced."""
        return None if self.forced and self.forced[0] else self.sampler

    def begin_turn(self, conversation: Conversation) -> Turn:
        """Return the next round, with what is forced on it."""
        turn = Turn(conversation.length, deque(self.forced.popleft() if self.forced else ()))
        self.turns.append(turn)
        return turn

    def can_look_again(self, turn: Turn, reencodes_pixels: bool, region_start: int | None) -> bool:
        """Return whether the picture still has the pixels that the look needs for which the turn asks, if any; else a
        notice.

        reencodes_pixels: whether re-encoding needs them; "clip" reads the first look's features.
        """
        if self.picture is None or self.picture.pixels is not None or not self.may_look:
            return True
        if not (reencodes_pixels if turn.end == "action" else region_start in turn.ids):
            return True
        turn.end = "looks"
        self.notices.append("no second look: the picture's pixels were not kept; show it again or use keep_pixels=True")
        return False

    def fits(self, conversation: Conversation, count: int) -> bool:
        """Return whether a look of `count` tokens can be appended; if not, the round ends for want of space, with a
        notice.
        """
        needed = conversation.length + count
        if needed > conversation.capacity:
            self.turns[-1].end = "capacity"
            self.notices.append(
                f"no second look: the conversation would hold {needed} tokens, the cache's capacity is "
                f"{conversation.capacity}; give the engine capacity >= {needed}"
            )
        return needed <= conversation.capacity

    def left_over(self, conversation: Conversation, ids: TokenIds) -> tuple[int, ...]:
        """Return what the last round said and the conversation was not fed: what stands before the next question.

        The token that ended the answer goes, and so does the beginning of a look that was not taken.
        """
        endings = (*ids.stop, ids.action_start, ids.action)
        return tuple(token for token in self.turns[-1].pending(conversation) if token not in endings)

    def summary(self, decode: Callable[[list[int]], str], timings: list[Stage], keep_prefix: bool) -> Answer:
        """Return what has come of the question."""
        first, last = self.turns[0], self.turns[-1]
        text = decode(last.ids)
        return Answer(
            text=text if keep_prefix else text.removeprefix(ANSWER_PREFIX),
            ids=last.ids,
            first_text=decode(first.ids),
            finish_reason=last.end,
            looks=self.looks,
            timings=timings,
            notices=self.notices,
            logits=torch.stack(last.logits) if last.logits else None,
        )


class CachePool:
    """Caches for conversations; one that is given back is leased again.

    make: a new cache, where none is idle. idle: those that no conversation has, the next one last.
    """

    def __init__(self, make: Callable[[], KVCache]) -> None:
        self._make = make
        self._kept: tuple[Tensor, Tensor] | None = None
        self.idle = [make()]

    def conversation(self, clock: Clock) -> Conversation:
        """Return a new conversation over one of the caches."""
        return Conversation(self.idle.pop() if self.idle else self._make(), clock, self._take_back)

    def keep_only(self, caches: Sequence[KVCache]) -> None:
        """Lease these buffers, which lie side by side, first from now on, and forget every other one that is given
        back.
        """
        self._kept, self.idle = caches[0].slab, list(caches)

    def _take_back(self, cache: KVCache) -> None:
        cache.clear()
        if self._kept is None or cache.slab is self._kept:
            self.idle.append(cache)
