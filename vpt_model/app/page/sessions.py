"""What one visitor has: pictures, conversations with branches, answers. Nobody else finds it, and it ends with them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vpt_model.app.page.line import Job
from vpt_model.app.page.pictures import Picture
from vpt_model.app.seen import answer_as_json
from vpt_model.engine import Chat
from vpt_model.engine.events import Answer


class Refused(Exception):
    """What a visitor asked for cannot be had: an HTTP status, and a sentence that says why and what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Limits:
    """What one visitor may take; all of them keep the machine usable for the others.

    upload: bytes of a file. upload_seconds: within which it must have arrived. pixels: of a picture. held: bytes of
    all pictures of all visitors. seconds: of one answer. idle: seconds after which an unused session ends.
    """

    upload: int = 20 << 20
    upload_seconds: float = 60
    pixels: int = 24_000_000
    pictures: int = 64
    held: int = 1 << 30
    branches: int = 8
    turns: int = 200
    sessions: int = 64
    waiting: int = 32
    seconds: float = 180
    idle: float = 1800
    question: int = 2000
    tokens: int = 256


@dataclass(frozen=True)
class Turn:
    """One question and its answer. remembered: earlier questions that the model knew of. scores: of re-encodings."""

    question: str
    picture: Picture | None
    looks: Sequence[str] | None
    answer: Answer
    scores: Sequence[Tensor]
    milliseconds: float
    second_look: float | None
    remembered: int
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))

    @property
    def truth(self) -> str | None:
        """The right answer, where it is known."""
        return self.picture.truths.get(self.question) if self.picture else None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values for the page and for those who keep it: pixels, milliseconds."""
        size = list(self.picture.size) if self.picture else None
        scene = self.picture.scene["seed"] if self.picture and self.picture.scene else None
        truth = {} if self.truth is None else {"truth": self.truth, "right": self.answer.text == self.truth}
        maps = [[round(value, 3) for value in scores.tolist()] for scores in self.scores]
        return {
            "id": self.id,
            "question": self.question,
            "picture": size,
            "example": scene,
            "forced_looks": list(self.looks) if self.looks else None,
            "remembered": self.remembered,
            "milliseconds": self.milliseconds,
            "second_look_ms": self.second_look,
            **truth,
            "answer": answer_as_json(self.answer) | {"conditioning": maps},
        }


@dataclass
class Branch:
    """A conversation: what was said in it, and the live chat of its last questions.

    shown: the pictures that the chat knows, in order.
    """

    turns: list[Turn] = field(default_factory=list)
    chat: Chat | None = None
    shown: list[Picture] = field(default_factory=list)

    def fork(self) -> Branch:
        """Return a second conversation that goes on from here."""
        chat = self.chat.fork()[0] if self.chat else None
        return Branch(list(self.turns), chat, list(self.shown))

    def undo(self) -> None:
        """Forget the last question. Raises `Refused` if there is none."""
        if not self.turns:
            raise Refused(409, "Nothing was asked in this conversation yet: there is nothing to undo.")
        self.turns.pop()
        if self.chat and len(self.chat):
            self.chat.rewind()
            del self.shown[len(self.chat.conversation.pictures) :]

    def replace_chat(self, chat: Chat | None, shown: list[Picture]) -> None:
        """Go on with another chat, and give the memory of this one back."""
        if self.chat is not None and self.chat is not chat:
            self.chat.close()
        self.chat, self.shown = chat, shown


@dataclass
class Session:
    """One visitor. job: what runs or waits for them."""

    id: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    pictures: dict[str, Picture] = field(default_factory=dict)
    branches: dict[int, Branch] = field(default_factory=lambda: {1: Branch()})
    job: Job | None = None
    used: float = field(default_factory=time.monotonic)
    ended: bool = False
    numbered: int = 1

    def branch(self, number: int) -> Branch:
        if number not in self.branches:
            raise Refused(404, f"There is no conversation {number} any more.")
        return self.branches[number]

    def picture(self, id: str) -> Picture:
        if id not in self.pictures:
            raise Refused(404, "This picture is not here any more: show it again.")
        return self.pictures[id]

    def turn(self, id: str) -> Turn:
        for branch in self.branches.values():
            for turn in branch.turns:
                if turn.id == id:
                    return turn
        raise Refused(404, "This answer is not here any more.")

    def idle(self) -> None:
        """Raise `Refused` while an answer is under way."""
        if self.job is not None:
            raise Refused(409, "An answer is under way: wait for it or stop it first.")

    def fork(self, number: int, limit: int) -> int:
        """Return the number of a new branch that begins behind this one."""
        if len(self.branches) >= limit:
            raise Refused(409, f"There are {limit} conversations: close one before you begin another.")
        branch = self.branch(number)
        self.numbered += 1
        self.branches[self.numbered] = branch.fork()
        return self.numbered

    def close(self, number: int) -> None:
        """Forget a branch; the last one leaves an empty one."""
        self.branch(number).replace_chat(None, [])
        del self.branches[number]
        if not self.branches:
            self.numbered += 1
            self.branches[self.numbered] = Branch()

    def forget_pictures(self) -> None:
        """Drop what no answer shows any more, but for the last one, so that a session does not grow without end."""
        kept = {turn.picture.id for branch in self.branches.values() for turn in branch.turns if turn.picture}
        for id in [id for id in list(self.pictures)[:-1] if id not in kept]:
            del self.pictures[id]

    def release(self) -> None:
        """Delete everything, as soon as no answer is under way."""
        self.ended = True
        if self.job is None:
            branches, self.branches, self.pictures = self.branches, {}, {}
            for branch in branches.values():
                branch.replace_chat(None, [])


class Sessions:
    """All visitors, found by ids that cannot be guessed."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._all: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._all.values()))

    def new(self) -> Session:
        if len(self._all) >= self.limits.sessions:
            raise Refused(503, f"{self.limits.sessions} people are here already: try again in a few minutes.")
        session = Session()
        self._all[session.id] = session
        return session

    def get(self, id: str) -> Session:
        session = self._all.get(id)
        if session is None:
            raise Refused(410, "This session has ended and its pictures are deleted: reload the page to begin anew.")
        session.used = time.monotonic()
        return session

    def end(self, session: Session) -> None:
        self._all.pop(session.id, None)
        session.release()

    def add(self, session: Session, picture: Picture) -> None:
        """Keep a visitor's picture. Raises `Refused` if there are too many, theirs or everybody's."""
        session.forget_pictures()
        if len(session.pictures) >= self.limits.pictures:
            raise Refused(409, f"This session holds {len(session.pictures)} pictures, the limit: undo or close some.")
        held = sum(p.pixels.nbytes for other in self for p in other.pictures.values())
        if held + picture.pixels.nbytes > self.limits.held:
            raise Refused(503, "The pictures of all visitors fill the server's memory: try again in a few minutes.")
        session.pictures[picture.id] = picture

    def expired(self) -> list[Session]:
        """Return those that nobody has used for too long."""
        now = time.monotonic()
        return [s for s in self if s.job is None and now - s.used > self.limits.idle]
