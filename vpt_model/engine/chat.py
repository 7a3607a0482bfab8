"""Live conversations: turn after turn over one cache, which takes what is new and nothing twice."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vpt_model.config import require_integer, require_type
from vpt_model.engine.conversation import Conversation, Mark, Picture, Question
from vpt_model.engine.events import Answer, Clock, Done, Event, Stage, last_answer
from vpt_model.engine.executor import Executor
from vpt_model.engine.sampling import Sampling
from vpt_model.engine.scheduler import Row, Scheduler
from vpt_model.network.cache import KVCache
from vpt_model.network.model import Model

if TYPE_CHECKING:
    from vpt_model.engine.engine import Engine

FIRST_ROWS = 512
"""Tokens for which a chat has room before it grows."""
MOST_FORKS = 1 << 16
"""At once; each has a cache of its own from its first turn on."""


@dataclass(frozen=True)
class Exchange:
    """One turn, and where the conversation stood before it, looking at which picture."""

    question: str
    answer: Answer
    before: Mark
    picture: Picture | None


class Chat:
    """A conversation with an engine: `ask` as often as you like; only what is new passes the model.

    Made by `Engine.chat`. A context manager: leaving it closes the chat. One turn at a time, from any thread.
    """

    def __init__(self, engine: Engine, conversation: Conversation, image: Any = None, keep_pixels: bool = True) -> None:
        self.engine, self.conversation, self.keep_pixels = engine, conversation, keep_pixels
        self.exchanges: list[Exchange] = []
        self._next = None if image is None else engine.picture(image)
        self._running = threading.Lock()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return how many turns have been taken."""
        return len(self.exchanges)

    @property
    def length(self) -> int:
        """Tokens that the model has been fed."""
        return self.conversation.length

    @property
    def nbytes(self) -> int:
        """Bytes of this chat's own buffers, pixels and features; what a fork reads of its parent counts there."""
        own = self.conversation.pictures[self.conversation.inherited :]
        return self.conversation.cache.nbytes + sum(picture.nbytes for picture in own)

    @property
    def timings(self) -> list[Stage]:
        """The stages of all turns."""
        return [stage for exchange in self.exchanges for stage in exchange.answer.timings]

    def ask(
        self,
        question: str,
        image: Any = None,
        *,
        looks: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Return the answer to a further question; arguments and errors as in `stream`."""
        options = {"max_new_tokens": max_new_tokens, "keep_logits": keep_logits, "sampling": sampling}
        return last_answer(self._events(self.row(question, image, looks, **options)))

    def stream(
        self,
        question: str,
        image: Any = None,
        *,
        looks: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
        sampling: Sampling | None = None,
    ) -> Generator[Event, None, None]:
        """Return one turn's events as they happen, `Done` last. A turn that is closed early, or fails, has not
        happened.

        image: a new picture, which the model is shown before the question (what `decode_image` takes); a number, of a
        picture that it was shown before (0 is the first); None for the picture of the last turn. Looks go to it. Other
        arguments, and errors, as of `Engine.stream`; further ValueErrors for an unknown number, for looks at a picture
        whose pixels were not kept, and for a chat that is closed or already in a turn.
        """
        options = {"max_new_tokens": max_new_tokens, "keep_logits": keep_logits, "sampling": sampling}
        return self._events(self.row(question, image, looks, **options))

    def row(self, question: str, image: Any = None, looks: Sequence[str] | None = None, **options: Any) -> Row:
        """Return one turn, checked, as a coroutine for a `Scheduler`; arguments and errors as of `stream`."""
        self.conversation.mark()  # of a closed chat this raises
        return self._turn(question, self.engine.question(self._picture(image), question, looks, **options))

    def _turn(self, text: str, question: Question) -> Row:
        with self._still():
            before, conversation = self.conversation.mark(), self.conversation
            conversation.clock = Clock(self.engine.model.device)
            try:
                answer = yield from self.engine.loop.answer(conversation, question)
            except BaseException:
                if not conversation.closed:
                    conversation.truncate(before)
                raise
            self.exchanges.append(Exchange(text, answer, before, self._next))
            self._next = question.picture
            if not self.keep_pixels and question.picture is not None:
                question.picture.pixels = None
        yield Done(answer)

    def _events(self, row: Row) -> Generator[Event, None, None]:
        with closing(Scheduler(self.engine.executor, [row]).events()) as events:
            yield from (event for _, event in events)

    def fork(self, n: int = 1) -> list[Chat]:
        """Return `n` chats that go on from here, each on its own; what was said so far is shared, not copied.

        They run without CUDA graphs. Raises TypeError for anything but an integer, ValueError as `stream` does, and if
        `n` is not in 1..65536.
        """
        require_integer("n", n, 1, MOST_FORKS)
        with self._still():
            return [self._fork() for _ in range(n)]

    def rewind(self, turn: int = -1) -> None:
        """Forget the turn of this number and all that follow it: 0 is the first, −1 the last.

        Raises ValueError if there is no such turn, and as `stream` does.
        """
        with self._still():
            if not -len(self) <= require_integer("turn", turn, -(1 << 63)) < len(self):
                raise ValueError(f"turn is {turn}; the chat has {len(self)}: give one of 0..{len(self) - 1}, or -1")
            first = self.exchanges[turn]
            self.conversation.truncate(first.before)
            self._next = first.picture
            del self.exchanges[turn:]

    def save(self, file: str | Path) -> None:
        """Write the chat to a safetensors file, which appears when it is complete; `Engine.load_chat` reads it.

        The file has the keys and values, the features, the pixels that are kept, ids and positions, and a fingerprint
        of the model; no logits and no timings. Raises ValueError as `stream` does.
        """
        require_type("file", file, (str, PathLike), "a path")
        from vpt_model.engine import store  # it makes chats, too

        with self._still():
            store.save(self, Path(file))

    def close(self) -> None:
        """Give the memory back; forgetting the chat does so, too. A closed chat takes no further turn."""
        self.conversation.close()
        self._next = None

    def _fork(self) -> Chat:
        fork = Chat(self.engine, self.conversation.fork(), keep_pixels=self.keep_pixels)
        theirs = dict(zip(map(id, self.conversation.pictures), fork.conversation.pictures, strict=True))
        fork.exchanges = [replace(e, picture=theirs.get(id(e.picture), e.picture)) for e in self.exchanges]
        fork._next = theirs.get(id(self._next), self._next)
        return fork

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Hold the chat still: no other turn runs, and none can begin."""
        if not self._running.acquire(blocking=False):
            raise ValueError("a turn of this chat is running: finish or close its stream first")
        try:
            self.conversation.mark()  # of a closed chat this raises
            yield
        finally:
            self._running.release()

    def _picture(self, image: Any) -> Picture | None:
        if image is None:
            return self._next
        if not isinstance(image, int) or isinstance(image, bool):
            return self.engine.picture(image)
        shown = self.conversation.pictures
        if not 0 <= image < len(shown):
            raise ValueError(
                f"image is {image}, but {len(shown)} were shown: give one of 0..{len(shown) - 1}, or a picture"
            )
        return shown[image]


class ChatMixin:
    """What an engine offers for live conversations."""

    model: Model
    executor: Executor
    capacity: int

    def chat(self, image: Any = None, *, capacity: int | None = None, keep_pixels: bool = True) -> Chat:
        """Return a live conversation, of which each turn feeds only what is new; use it in a `with` statement.

        image: shown in the first turn. capacity: tokens that it may hold, by default the engine's; it takes memory as
        it grows. keep_pixels: False drops the pixels of each picture after its turn: then regions of it, and dino and
        sam looks at it, can no longer be seen. Raises ValueError or TypeError for a bad image or capacity.
        """
        require_type("keep_pixels", keep_pixels, bool, "True or False")
        capacity = self.capacity if capacity is None else require_integer("capacity", capacity, 1, 1 << 31)
        cache = self.model.language.new_cache(capacity, FIRST_ROWS)
        conversation = Conversation(cache, Clock(self.model.device), KVCache.clear)
        return Chat(cast("Engine", self), conversation, image, keep_pixels)

    def load_chat(self, file: str | Path) -> Chat:
        """Return the chat that `Chat.save` has written to a file, which goes on with the ids that it would have gone on
        with.

        Raises ValueError if the file is none of `Chat.save`, if another model wrote it, or if it does not fit.
        """
        require_type("file", file, (str, PathLike), "a path")
        from vpt_model.engine import store  # it makes chats, too

        return store.load(cast("Engine", self), Path(file))

    def ask_chats(
        self,
        chats: Sequence[Chat],
        questions: Sequence[str],
        samplings: Sequence[Sampling | None] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Take one turn of several chats, such as forks of one, in one ragged batch; options as of `Chat.ask`, for
        all.

        Raises ValueError or TypeError as `Chat.ask` does for any of them, and if the lists differ in length; an error
        ends all of these turns.
        """
        require_type("chats", chats, (list, tuple), "a list of chats")
        require_type("questions", questions, (list, tuple), "a list of strings")
        require_type("samplings", samplings, (list, tuple, type(None)), "a list of Sampling or None, or None")
        for number, chat in enumerate(chats):
            require_type(f"chat {number}", chat, Chat, "what Engine.chat returns")
        samplings = [None] * len(chats) if samplings is None else samplings
        if not len(chats) == len(questions) == len(samplings):
            counts = f"{len(chats)} chats, {len(questions)} questions and {len(samplings)} samplings"
            raise ValueError(f"{counts} were given: give one of each for every chat")
        each = zip(chats, questions, samplings, strict=True)
        rows = [chat.row(question, sampling=sampling, **options) for chat, question, sampling in each]
        answers = {row: e.answer for row, e in Scheduler(self.executor, rows).events() if isinstance(e, Done)}
        return [answers[row] for row in range(len(rows))]
