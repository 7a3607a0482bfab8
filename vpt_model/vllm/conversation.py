"""One request of the engine core: what it has said, what it may see, and what is appended when it asks for a look.

Nothing here knows vLLM. The scheduler tells a conversation which tokens were sampled where a turn may end, and carries
out the `Append` that it answers with. README.md draws the states.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from vpt_model.text.prompt import action_round, region_round
from vpt_model.vllm.perception import Box, Perception, image_grid, reencoded_tokens

_NO_PIXELS = torch.empty(0, 0, 3, dtype=torch.uint8)


class State(Enum):
    """What the next token of a conversation is for."""

    ANSWERING = "it is part of the turn"
    CAPTURING = "none: the action start was fed alone, and the image is encoded again under the state behind it"
    ANNOUNCED = "it is the action token unless it ends the turn; the state behind the action start is its embedding"
    UNANNOUNCED = "none: an action token came without its start, and the state before it is its embedding"


# By whether a look follows, and whether the action start announced the action.
_STATES = {(True, True): State.CAPTURING, (False, True): State.ANNOUNCED, (False, False): State.UNANNOUNCED}


class End(Enum):
    """Why a conversation ends: vLLM found its end, tokens, room or slots are used up, or something here is wrong."""

    FOUND, FULL, FAILED = "found", "full", "failed"


@dataclass(frozen=True)
class Shown:
    """An image among the tokens of a conversation.

    start, length: the tokens it stands for. first: of these, the first pad. name: equal names mean equal features.
    pixels: uint8 [height, width, 3]. grid: of a crop, in patches. slot: None for a crop; else the control state that
    conditions the image and is the embedding of token `start`, with no image at all where `length` is 1. picture: the
    name of the image that is encoded again.
    """

    start: int
    length: int
    first: int
    name: str
    pixels: Tensor
    grid: tuple[int, int] = (0, 0)
    slot: int | None = None
    picture: str = ""


@dataclass(frozen=True)
class Append:
    """What the request goes on with: `tokens` behind its first `keep` ones, and the images among them.

    slot: where the state behind the last token is stored, or None, and tokens are generated. streamed: tokens of this
    step that the client sees.
    """

    keep: int
    tokens: list[int]
    shown: tuple[Shown, ...] = ()
    slot: int | None = None
    streamed: list[int] = field(default_factory=list)


@dataclass
class Conversation:
    """A request, and how far it has come.

    params: its SamplingParams. image: name and uint8 pixels [height, width, 3] of the last picture of its prompt.
    max_looks: second looks that it may take. forced: turns that come first, whatever the model would say. round_start:
    tokens up to and including the current assistant header. capacity: tokens that a request may hold. free_slots: the
    free control slots of the whole engine. turn: tokens since round_start. slots: the taken control slots, each with
    the place of what it conditions. looks, notices: what the client is told at the end. streamed: tokens that the
    client has seen. asked: when the request last asked for a look, in seconds of `time.monotonic`.
    """

    perception: Perception
    params: Any
    image: tuple[str, Tensor] | None
    max_looks: int
    forced: deque[list[int]]
    round_start: int
    capacity: int
    free_slots: list[int]
    state: State = State.ANSWERING
    turn: list[int] = field(default_factory=list)
    slots: list[tuple[int, int]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    streamed: int = 0
    asked: float | None = None

    @property
    def may_look(self) -> bool:
        """Whether there is a picture, and another look at it is allowed."""
        return self.image is not None and len(self.looks) < self.max_looks

    @property
    def left(self) -> int:
        """Tokens that the client may still see; OpenAI's limit holds for all rounds together."""
        return int(self.params.max_tokens) - self.streamed

    @property
    def is_forced(self) -> bool:
        """Whether the next turn is given, whatever the model would say."""
        return bool(self.forced) and not self.turn and self.state is State.ANSWERING

    def ends_for_good(self, tokens: list[int]) -> bool:
        """Return whether the turn that ends with `tokens` asks for nothing; this changes nothing."""
        ids = self.perception.tokenizer.ids
        if self.state is not State.ANSWERING or self.is_forced or tokens[-1] in (ids.action_start, ids.action):
            return False
        return not self._boxes(self.turn + tokens, silent=True)

    def take(self, tokens: list[int], all_token_ids: Sequence[int]) -> Append | End:
        """Take the tokens with which a turn may end; return what is appended, or why the request ends.

        tokens: where the request ends, they become what the client sees last. all_token_ids: the request's tokens so
        far, these included.
        """
        ids = self.perception.tokenizer.ids
        if self.state is not State.ANSWERING:
            return self._captured(tokens, len(all_token_ids) - 1)
        forced = self.is_forced
        self.turn += self.forced.popleft() if forced else tokens
        # Tokens that the client asked for are not told; there are no log-probabilities to go with them either.
        streamed = [] if forced else tokens
        if self.turn[-1] in (ids.action_start, ids.action):
            return End.FULL if self.left <= len(streamed) else self._capture(all_token_ids, streamed)
        boxes = self._boxes(self.turn)
        if not boxes:
            return End.FOUND
        return End.FULL if self.left <= len(streamed) else self._crop(boxes, all_token_ids, streamed, forced)

    def _boxes(self, turn: list[int], silent: bool = False) -> tuple[Box, ...]:
        if self.image is None or not self.may_look or turn[-1] not in self.perception.tokenizer.ids.stop:
            return ()
        height, width, _ = self.image[1].shape
        try:
            boxes = self.perception.boxes(height, width, turn)
            if boxes and self.perception.tokenizer.ids.action in turn and self._read_again(turn[:-1]) != turn[:-1]:
                # The engine feeds such an answer anew, state by state; its places hold one state each here.
                raise ValueError(
                    "the answer's text has other ids than were generated, and among them is an action token, whose "
                    "embedding is the state before it: that state is not kept"
                )
            return boxes
        except ValueError as error:
            if not silent:
                self.notices.append(f"no second look: {error}")
            return ()

    def _read_again(self, answer: list[int]) -> list[int]:
        """Return the ids of an answer's text, which a second round reads."""
        tokenizer = self.perception.tokenizer
        return tokenizer.encode(tokenizer.decode(answer))

    def _capture(self, all_token_ids: Sequence[int], streamed: list[int]) -> Append | End:
        """Feed a token alone; the state behind it goes to a slot, and the token sampled behind it may not be used."""
        ids, keep = self.perception.tokenizer.ids, len(all_token_ids) - 1
        token, count, announced = self.turn[-1], 2, self.turn[-1] == ids.action_start
        if looks := announced and self.may_look:
            # The second round starts from the bare action span: text that led to it is forgotten.
            keep, count = self.round_start, 1 + len(action_round(ids, self._reencoded))
        elif not announced:
            keep, token = keep - 1, all_token_ids[keep - 1]
        if not self._fits(keep + count):
            return End.FULL
        self._forget(keep)
        if not self.free_slots:
            self.notices.append("no second look: all control slots are in use; serve with a larger --max-num-seqs")
            return End.FULL
        self.state = _STATES[looks, announced]
        slot = self.free_slots.pop()
        self.slots.append((keep + 1, slot))
        return Append(keep, [token], slot=slot, streamed=streamed)

    def _captured(self, tokens: list[int], keep: int) -> Append | End:
        """Go on behind the token whose state was captured; `tokens` was sampled behind it, at place `keep`."""
        ids, state, (_, slot) = self.perception.tokenizer.ids, self.state, self.slots[-1]
        self.state = State.ANSWERING
        assert ids.kind_pad is not None and ids.action is not None, "states are captured for actions alone"
        if state is State.CAPTURING:
            span = action_round(ids, self._reencoded)
            first, (name, pixels) = span.index(ids.kind_pad), self._picture
            length = first + self._reencoded
            look = Shown(keep, length, first, uuid.uuid4().hex, pixels, slot=slot, picture=name)
            return self._look(keep, span, (look,), ())
        if state is State.ANNOUNCED and tokens[-1] in ids.stop:
            self.turn += tokens
            return End.FOUND
        streamed = [ids.action] if state is State.ANNOUNCED else []
        if streamed and self.left <= 1:
            tokens[:] = streamed
            return End.FULL
        self.turn += streamed
        lone = Shown(keep, 1, 1, uuid.uuid4().hex, _NO_PIXELS, slot=slot)
        return Append(keep, [ids.action], (lone,), streamed=streamed)

    def _crop(
        self, boxes: tuple[Box, ...], all_token_ids: Sequence[int], streamed: list[int], forced: bool
    ) -> Append | End:
        perception, keep, (name, pixels) = self.perception, len(all_token_ids) - 1, self._picture
        answer = self.turn[:-1]
        again = self._read_again(answer)
        unfed = answer if forced else []
        if again != answer:
            keep, unfed = self.round_start, again
        crops = [pixels[top:bottom, left:right].contiguous() for left, top, right, bottom in boxes]
        grids = [image_grid(perception.config, *crop.shape[:2]) for crop in crops]
        counts = [rows * columns // perception.config.vision.spatial_merge_size**2 for rows, columns in grids]
        tokens = unfed + region_round(perception.tokenizer.ids, counts, perception.tokenizer.encode)
        if not self._fits(keep + len(tokens)):
            return End.FULL
        starts = [i + 1 for i, token in enumerate(tokens) if token == perception.tokenizer.ids.vision_start]
        names = [f"{name}:{','.join(map(str, box))}" for box in boxes]
        places = zip(starts, counts, names, crops, grids, strict=True)
        shown = tuple(Shown(keep + start, n, 0, own, crop, grid) for start, n, own, crop, grid in places)
        return self._look(keep, tokens, shown, boxes, streamed)

    def _look(
        self,
        keep: int,
        tokens: list[int],
        shown: tuple[Shown, ...],
        boxes: tuple[Box, ...],
        streamed: Sequence[int] = (),
    ) -> Append:
        kind = "region" if boxes else self.perception.encoder
        seen = sum(each.length - each.first for each in shown)
        look = {"kind": kind, "boxes": [list(box) for box in boxes], "tokens": seen, "appended": len(tokens)}
        self.looks.append(look | {"ids": list(tokens)})
        self._forget(keep)
        self.turn, self.round_start = [], keep + len(tokens)
        return Append(keep, tokens, shown, streamed=list(streamed))

    def _forget(self, keep: int) -> None:
        """Free the slots of what stands behind the first `keep` tokens, which is cut off."""
        self.free_slots += [slot for place, slot in self.slots if place > keep]
        self.slots = [(place, slot) for place, slot in self.slots if place <= keep]

    def _fits(self, count: int) -> bool:
        if count >= self.capacity:
            self.notices.append(f"no second look: {count} tokens, of --max-model-len {self.capacity}")
        return count < self.capacity

    @property
    def _picture(self) -> tuple[str, Tensor]:
        assert self.image is not None
        return self.image

    @property
    def _reencoded(self) -> int:
        return reencoded_tokens(self.perception.config, *self._picture[1].shape[:2])
