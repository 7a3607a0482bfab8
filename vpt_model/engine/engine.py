"""The engine: what it takes, what it refuses, and what it keeps between questions.

How a question is answered stands in `vpt_model.engine.loop`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from vpt_kernels import qwen2_vl_policy
from vpt_model.config import require_integer, require_type
from vpt_model.engine.admission import admit, paired, uploaded
from vpt_model.engine.chat import ChatMixin
from vpt_model.engine.conversation import CachePool, Picture, Question
from vpt_model.engine.events import Answer, Clock, Done, Event, last_answer
from vpt_model.engine.executor import Captured, Eager, Executor
from vpt_model.engine.graphs import Graphs, warmed
from vpt_model.engine.loop import Loop
from vpt_model.engine.sampling import Sampling
from vpt_model.engine.scheduler import Row, Scheduler
from vpt_model.network.model import Model
from vpt_model.text.prompt import PromptFormat
from vpt_model.text.tokens import Tokenizer


class Engine(ChatMixin):
    """Answers questions about images with second looks.

    model, tokenizer: of the same variant. max_looks: second looks per question; 1 is the published procedure, 0 never
    looks again. capacity: tokens that a conversation may hold. longest_edge: pixels to which an image or a crop is
    reduced before the vision tower sees it (default: the configuration's `image_resolution`). prompt: the texts around
    the question (default: `PromptFormat()`). keep_prefix: leave the "Now answer the question." that the models learned
    to print in the answer's text. speculate: on a GPU, begin the re-encoder's work beside the first round, unasked.

    Greedy decoding unless a request brings its `Sampling`. Where the published code is silent or undefined:
    `<|endoftext|>` also ends generation; a region without a column or a row ends the conversation with the answer that
    holds it and a notice; an answer that mixes regions and an action counts as the action, because the first action
    start ends the round. As published, the token after an action start that leads to no look is the action token,
    unless it ends the turn.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_looks: int = 1,
        capacity: int = 2048,
        longest_edge: int | None = None,
        prompt: PromptFormat | None = None,
        keep_prefix: bool = False,
        speculate: bool = False,
    ) -> None:
        require_type("model", model, Model, "a vpt_model.Model")
        require_type("tokenizer", tokenizer, Tokenizer, "a vpt_model.Tokenizer")
        require_type("prompt", prompt, (PromptFormat, type(None)), "a PromptFormat or None")
        require_type("keep_prefix", keep_prefix, bool, "True or False")
        require_type("speculate", speculate, bool, "True or False")
        if tokenizer.ids.kind != model.config.kind:
            raise ValueError(
                f"the tokenizer is of kind {tokenizer.ids.kind!r}, the model of {model.config.kind!r}: they must agree"
            )
        if require_integer("max_looks", max_looks, -(1 << 63)) < 0:
            raise ValueError(f"max_looks is {max_looks}; it must be 0 or more")
        capacity = require_integer("capacity", capacity, 1, 1 << 31)
        if longest_edge is None:
            longest_edge = model.config.image_resolution
        self.model = model
        self.tokenizer, self.ids = tokenizer, tokenizer.ids
        self.max_looks = max_looks
        self.capacity = capacity
        self.prompt = prompt or PromptFormat()
        self.policy = qwen2_vl_policy(longest_edge=longest_edge, pass_order="hv")
        self.loop = Loop(model, tokenizer, self.prompt, self.policy, keep_prefix)
        self.executor: Executor = Eager(model, speculate)
        self.pool = CachePool(lambda: self.model.language.new_cache(capacity))
        self._speculate = speculate

    def __reduce__(self) -> str:
        raise TypeError(
            "an Engine holds caches, and graphs on a GPU, of its process: pickle its model and its tokenizer, and "
            "make one in each process"
        )

    def warm_up(self) -> dict[str, float]:
        """Capture CUDA graphs for the steps that recur, and run once what is in none; return the seconds of each, none
        on a CPU.

        What fits no graph, and all that was begun before this call, runs without, and chooses the same tokens. Takes
        the memory of `vpt_model.engine.graphs.ROWS` caches.
        """
        if self.model.device.type != "cuda":
            return {}
        model, graphs, seconds = warmed(self.model, self.capacity, self.policy)
        self.use(model, graphs)
        return seconds

    def use(self, model: Model, graphs: Graphs) -> None:
        """Run questions that are asked from now on by these towers and graphs, in the graphs' caches."""
        self.model, self.executor = model, Captured(Eager(model, self._speculate), graphs)
        self.pool.keep_only(graphs.caches)

    def ask(
        self,
        image: Any,
        question: str,
        *,
        looks: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Return the answer to `question`; arguments and errors as in `stream`."""
        return last_answer(self._stream(self.question(image, question, looks, max_new_tokens, keep_logits, sampling)))

    def ask_batch(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        *,
        looks: Sequence[Sequence[str] | None] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
        sampling: Sampling | None = None,
    ) -> list[Answer]:
        """Return the answers to several questions, each about its own image (or None), in one ragged batch.

        Row i is `ask(images[i], questions[i], looks=looks[i], ...)`, with a cache and a sampler of its own: rows may
        take different paths and have different lengths. Whatever the unfinished rows have to append (a prompt, a second
        look, one token) passes the language model in one call, one row behind the other without padding, and each
        attends to its own cache. So every row's ids are those of its single run, and its logits up to rounding. Images
        are encoded row by row. The times of a row's stages include waiting for the other rows.

        Raises ValueError or TypeError as `stream` does for any row, and if the lengths of the lists differ; an error
        ends the whole batch.
        """
        options = max_new_tokens, keep_logits, sampling
        asked = [self.question(*row, *options) for row in paired(images, questions, looks)]
        answers = {row: event.answer for row, event in self.events(asked) if isinstance(event, Done)}
        return [answers[row] for row in range(len(asked))]

    def stream(
        self,
        image: Any,
        question: str,
        *,
        looks: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
        sampling: Sampling | None = None,
    ) -> Generator[Event, None, None]:
        """Return the events as they happen, `Done` last. Closing the iterator early gives its cache back.

        image: what `decode_image` takes, copied now, or None for a question without image; files are turned upright,
        PIL images and pixels are not, with a notice in the answer where the image's EXIF says otherwise. looks: forced
        looks, one per round, that replace what the model would generate there (`parse_look`). max_new_tokens: per
        round; forced tokens are free. keep_logits: keep the logits of the final answer. sampling: how tokens are
        chosen; greedy if None. Raises ValueError or TypeError on bad input; a prompt that does not fit into the cache
        raises ValueError at the first event, before anything is written.
        """
        return self._stream(self.question(image, question, looks, max_new_tokens, keep_logits, sampling))

    def question(
        self,
        image: Any,
        question: str,
        looks: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
        sampling: Sampling | None = None,
    ) -> Question:
        """Return a question that has been checked and not been asked; arguments and errors as in `stream`."""
        picture = image if image is None or isinstance(image, Picture) else self.picture(image)
        asked = picture, question, looks, self.max_looks, max_new_tokens, keep_logits, sampling
        return admit(self.loop, *asked)

    def picture(self, image: Any) -> Picture:
        """Return an image (what `decode_image` takes) on the model's device, which no conversation has been shown
        yet.
        """
        return uploaded(image, self.model.device)

    def events(self, questions: Sequence[Question]) -> Generator[tuple[int, Event], None, None]:
        """Answer several questions side by side: every event with the number of its question, as they happen.

        Closing the iterator gives the caches back.
        """
        return Scheduler(self.executor, [self._row(question) for question in questions]).events()

    def _stream(self, question: Question) -> Generator[Event, None, None]:
        with closing(self.events([question])) as events:
            yield from (event for _, event in events)

    def _row(self, question: Question) -> Row:
        """Run a question in a conversation of its own, which leases a cache when it is first advanced."""
        with closing(self.pool.conversation(Clock(self.model.device))) as conversation:
            answer = yield from self.loop.answer(conversation, question)
        yield Done(answer)
