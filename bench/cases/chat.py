"""A further turn of a live chat of the engine, up to its first answer token, against the whole conversation again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Alternative, Case, WrongResult, absent, require_close, smooth_pixels, sweep
from bench.cases.engine import procedures, transformers_twin
from bench.cases.live import OPTIONS, attention_apart, conversation, forget
from bench.workloads import ChatTurn
from vpt_model.engine import Answer, Chat

TOLERANCE = 1e-4
FIRST, QUESTION = "Which of these is the largest?", "And the smallest?"
ZOOM = "region:x2,y1,x5,y4"


class Turn:
    """A chat behind its first turn: a photo and `behind` bytes of text, one token each.

    Every call takes one turn and undoes it.
    """

    def __init__(self, workload: ChatTurn, device: str) -> None:
        self.workload, self.engine = workload, procedures(workload.preset, "clip", device).engine
        # Nothing here is resized: the engine does it as the authors' Pillow did, transformers as the installed one.
        self.photo, self.other = (torch.from_numpy(smooth_pixels(448, 448 - 28 * shift)) for shift in (0, 1))
        self.chat = self._first()
        self.before = self.chat.length
        self.answer = self.take(self.chat)
        self.after = self.chat.length
        self.ids = list(self.chat.conversation.tokens)
        self.chat.rewind()

    def _first(self) -> Chat:
        chat = self.engine.chat(self.photo)
        chat.ask("x" * self.workload.behind + FIRST, max_new_tokens=1)
        return chat

    def take(self, chat: Chat) -> Answer:
        """Return the turn."""
        image = self.other if self.workload.turn == "image" else None
        looks = [ZOOM] if self.workload.turn == "zoom" else None
        return chat.ask(QUESTION, image, looks=looks, max_new_tokens=1)

    def ours(self) -> Tensor:
        """Return the logits of the first answer token."""
        self.take(self.chat)
        self.chat.rewind()
        return self._said()

    def anew(self) -> Tensor:
        """Return the same, from an empty cache."""
        with self._first() as chat:
            self.take(chat)
        return self._said()

    def _said(self) -> Tensor:
        """Return what was said last; kept by the engine, the logits would cost a call for each forced token."""
        (said,) = self.engine.executor.said
        self.engine.executor.fed.clear()
        return said.logits

    def check_tokens(self) -> None:
        """Raise WrongResult unless the turn feeds what is new, and no picture that was seen passes the tower again."""
        fed = sum(stage.work.get("tokens", 0) for stage in self.answer.timings)
        towers = sum(stage.work.get("vit_calls", 0) for stage in self.answer.timings)
        new, pictures = self.after - self.before, {"question": 0, "image": 1, "zoom": 1}[self.workload.turn]
        if (fed, towers) != (new, pictures):
            raise WrongResult(f"the turn fed {fed} tokens and {towers} pictures, not the {new} and {pictures} new ones")


class Live:
    """The turn with a model of transformers; what a look says, and the crop that it sees, is appended as it stands."""

    def __init__(self, turn: Turn) -> None:
        new = {"image": turn.other, "zoom": turn.photo}.get(turn.workload.turn)
        for look in turn.answer.looks:
            left, top, right, bottom = look.boxes[0]
            new = turn.photo[top:bottom, left:right]
        self.ids = turn.engine.ids
        model = transformers_twin(turn.workload.preset, "clip", str(turn.engine.model.device))
        self.chat = conversation(model, self.ids.vision_end)
        self._append(turn.ids[: turn.before], turn.photo)
        self.chat.generate(**OPTIONS)
        del self.chat.ids[turn.before :]  # what it says there is not what the engine says
        self.before, self.rest, self.picture = turn.before, turn.ids[turn.before :], new

    def ours(self) -> Tensor:
        """Return the logits of the first answer token."""
        self._append(self.rest, self.picture)
        logits = self.chat.generate(**OPTIONS).logits[0][0]
        forget(self.chat, self.before)
        return logits

    def _append(self, ids: list[int], picture: Any) -> None:
        """Feed ids of one picture at most, which stands between its start and its end token."""
        if picture is not None:
            start, end = ids.index(self.ids.vision_start), ids.index(self.ids.vision_end) + 1
            self.chat.append(" ".join(map(str, ids[:start])))
            self.chat.append(" ".join(map(str, ids[end:])), picture)
        else:
            self.chat.append(" ".join(map(str, ids)))


ANEW = Alternative(
    "this engine, the conversation anew",
    "the first turn and this one over an empty cache, what `Engine.ask` without a chat would have to do",
    lambda turn: turn.anew,
)
LIVE = Alternative(
    "`LiveConversation`",
    "the same ids and pictures appended to transformers' Qwen2-VL over the same weights, patched",
    lambda turn: Live(turn).ours,
    available=lambda turn: absent("transformers"),
)
ALTERNATIVES = (ANEW, LIVE)


def build(workload: ChatTurn, device: str) -> Case:
    """Return a turn of `Chat` up to its first answer token."""
    turn = Turn(workload, device)
    others = {one.name: one.calls([turn]) for one in ALTERNATIVES}

    def check() -> None:
        turn.check_tokens()
        for name, calls in others.items():
            if not isinstance(calls, str):
                require_close(name, calls[0](), turn.ours(), TOLERANCE)

    def timeline() -> dict[str, dict[str, float]]:
        stages = {}
        for stage in turn.take(turn.chat).timings:
            stages[stage.name] = stages.get(stage.name, 0.0) + stage.milliseconds
        turn.chat.rewind()
        return {"ours": stages, "ours, attention apart": attention_apart(turn.ours)}

    shown = (workload.op, workload.shape, workload.dtype, device)
    series = sweep(workload.op, workload)
    return Case(*shown, [turn.ours], others, check, None, capture=False, sweep=series, timeline=timeline)
