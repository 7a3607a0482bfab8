"""The multi-pass loop of visual perception tokens over one append-only cache.

    image ── look ──┐
    question ───────┴─ prefill ── decode ──┬── answer
                                    ↑      ├── region span ──── crop, look ─────────────────┐
                                    │      └── action start ─── feed it → h*, re-encode ────┤
                                    └──────────────────── append ───────────────────────────┘

Every token passes the language model once. The control state h* and all keys and values cached before it do not
depend on the new image, so a second look is appended and nothing is prefilled again. Source: arXiv 2502.17425.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vpt_kernels import decode_image, qwen2_vl_policy
from vpt_model.config import ENCODERS
from vpt_model.engine import perception
from vpt_model.engine.conversation import Chunk, Conversation, Turn
from vpt_model.engine.events import Answer, Box, Clock, Done, Event, Look, Reencode, Region, Token
from vpt_model.engine.graphs import Graphs
from vpt_model.engine.sampling import Sampler, Sampling
from vpt_model.network.cache import KVCache
from vpt_model.network.model import Model
from vpt_model.network.positions import mrope_positions
from vpt_model.network.tower_graphs import captured
from vpt_model.text.prompt import ANSWER_PREFIX, PromptFormat, action_round, first_round, region_round
from vpt_model.text.tokens import Tokenizer, crop_box, parse_look, parse_region_ids

Row = Generator[Event | Chunk, None, None]
"""One conversation as a coroutine: it yields its events and, where it needs the language model, a chunk to feed."""


class Engine:
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
        if tokenizer.ids.kind != model.config.kind:
            raise ValueError(
                f"the tokenizer is of kind {tokenizer.ids.kind!r}, the model of {model.config.kind!r}: they must agree"
            )
        if max_looks < 0:
            raise ValueError(f"max_looks is {max_looks}; it must be 0 or more")
        self.model = model
        self.tokenizer = tokenizer
        self.ids = tokenizer.ids
        self.reencoder = next((name for name, kind in ENCODERS.items() if kind == self.ids.kind), None)
        self.max_looks = max_looks
        self.capacity = capacity
        self.prompt = prompt or PromptFormat()
        self.keep_prefix = keep_prefix
        self.speculate = speculate and model.encoder is not None and model.device.type == "cuda"
        self.policy = qwen2_vl_policy(longest_edge=longest_edge or model.config.image_resolution, pass_order="hv")
        self._idle = [self.new_cache()]
        self._graphs: Graphs | None = None

    def warm_up(self) -> dict[str, float]:
        """Capture CUDA graphs for the steps that recur; the seconds each took. Nothing on a CPU.

        What fits no graph, and all that runs before this call, runs without, and chooses the same tokens. Takes the
        memory of `vpt_model.engine.graphs.ROWS` caches. Not while a stream is open.
        """
        if self.model.device.type != "cuda":
            return {}
        with torch.inference_mode():
            self._graphs = Graphs(self.model.language, self.capacity)
            self._idle = list(self._graphs.caches)
            seconds = self._graphs.capture()
            self.model, towers = captured(self.model)
        return seconds | towers

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
        """The answer to `question`; arguments and errors as in `stream`."""
        row = self._admit(image, question, looks, max_new_tokens, keep_logits, sampling)
        *_, done = self._events(row)
        return done.answer

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
        """The answers to several questions, each about its own image (or None), in one ragged batch.

        Row i is `ask(images[i], questions[i], looks=looks[i], ...)`, with a cache and a sampler of its own: rows may
        take different paths and have different lengths. Whatever the unfinished rows have to append (a prompt, a second
        look, one token) passes the language model in one call, one row behind the other without padding, and each
        attends to its own cache. So every row's ids are those of its single run, and its logits up to rounding. Images
        are encoded row by row. The times of a row's stages include waiting for the other rows.

        Raises ValueError or TypeError as `stream` does for any row, and if the lengths of the lists differ; an error
        ends the whole batch.
        """
        looks = [None] * len(questions) if looks is None else looks
        if not len(images) == len(questions) == len(looks):
            raise ValueError(
                f"{len(images)} images, {len(questions)} questions and {len(looks)} lists of looks were given: "
                "give one of each for every row (None for no image, None for no forced looks)"
            )
        requests = zip(images, questions, looks, strict=True)
        rows = [self._admit(*request, max_new_tokens, keep_logits, sampling) for request in requests]
        answers = {number: event.answer for number, event in self._together(rows) if isinstance(event, Done)}
        return [answers[number] for number in range(len(rows))]

    def stream(
        self,
        image: Any,
        question: str,
        *,
        looks: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
        sampling: Sampling | None = None,
    ) -> Iterator[Event]:
        """Events as they happen, `Done` last. Closing the iterator early gives its cache back.

        image: what `decode_image` takes, or None for a question without image. looks: forced looks, one per round, that
        replace what the model would generate there (`parse_look`). max_new_tokens: per round; forced tokens are free.
        keep_logits: keep the logits of the final answer. sampling: how tokens are chosen; greedy if None. Raises
        ValueError or TypeError on bad input; a prompt that does not fit into the cache raises ValueError at the first
        event, before anything is written.
        """
        return self._events(self._admit(image, question, looks, max_new_tokens, keep_logits, sampling))

    def new_cache(self) -> KVCache:
        """An empty cache for one conversation."""
        return self.model.language.new_cache(self.capacity)

    def positions(self, tokens: Tensor, grids: Sequence[tuple[int, int]], start: int) -> Tensor:
        """M-RoPE positions int64 [3, T] of a chunk that begins at position `start`."""
        merge = self.model.config.vision.spatial_merge_size
        return mrope_positions(tokens, grids, start, self.ids.image_pad, merge)[0]

    def control_state(self, hidden: Tensor) -> Tensor:
        """h* [1, H] from the final hidden state at the action start: the same, as embedding and as condition."""
        return hidden

    def _admit(
        self,
        image: Any,
        question: str,
        looks: Sequence[str] | None,
        max_new_tokens: int,
        keep_logits: bool,
        sampling: Sampling | None,
    ) -> Row:
        """Check a request; the conversation takes a cache when it is first advanced."""
        if not isinstance(question, str):
            raise TypeError(f"question is a {type(question).__name__}; it must be a string")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        forced = deque(parse_look(spec, self.ids) for spec in looks or ())
        if len(forced) > self.max_looks:
            raise ValueError(
                f"{len(forced)} looks are forced but max_looks is {self.max_looks}: raise it or drop looks"
            )
        if forced and image is None:
            raise ValueError(f"look {looks[0]!r} needs an image and there is none: pass an image or drop the look")
        user = self.tokenizer.encode(self.prompt.user_text(question, image is not None))
        if reserved := self.ids.stop.intersection(user):
            raise ValueError(
                f"the question contains special tokens (ids {sorted(reserved)}): remove them from the text"
            )
        pixels = None if image is None else perception.upload(decode_image(image), self.model.device)
        for answer in forced:
            self._boxes(pixels, answer)
        options = {"max_new_tokens": max_new_tokens, "keep_logits": keep_logits, "choose": Sampler(sampling)}
        return self._run(user, image=pixels, forced=forced, **options)

    def _events(self, row: Row) -> Generator[Event, None, None]:
        with closing(self._together([row])) as events:
            for _, event in events:
                yield event

    @torch.inference_mode()
    def _together(self, rows: Sequence[Row]) -> Generator[tuple[int, Event], None, None]:
        """Every event with the number of its row. Each row runs until it needs the language model; then all are fed."""
        with ExitStack() as stack:
            for row in rows:
                stack.callback(row.close)
            running = dict(enumerate(rows))
            while running:
                chunks = []
                for number, row in list(running.items()):
                    for step in row:
                        if isinstance(step, Chunk):
                            chunks.append(step)
                            break
                        yield number, step
                    else:
                        del running[number]
                if chunks:
                    self._feed(chunks)

    def _feed(self, chunks: Sequence[Chunk]) -> None:
        """Every token passes the language model here, once: the chunks of all conversations in one ragged call."""
        if self._graphs is not None and self._graphs.feed(chunks):
            return
        lengths = [len(chunk.tokens) for chunk in chunks]
        embeds = torch.cat([self._embed(c.tokens) if c.embeds is None else c.embeds for c in chunks])
        positions = torch.cat([c.positions for c in chunks], dim=1)
        hidden = self.model.language.forward(embeds, positions, [chunk.talk.cache for chunk in chunks], lengths)
        ends = list(accumulate(lengths))
        sampled = [hidden[end - 1 : end] for chunk, end in zip(chunks, ends, strict=True) if chunk.sample]
        logits = iter(self.model.language.logits(torch.cat(sampled)) if sampled else ())
        for chunk, end in zip(chunks, ends, strict=True):
            chunk.talk.last, chunk.talk.hidden = chunk.tokens[-1], hidden[end - 1 : end]
            chunk.talk.logits, chunk.talk.likeliest = next(logits) if chunk.sample else None, None

    def _run(self, user: list[int], **request: Any) -> Row:
        with self._conversation(**request) as talk:
            yield from self._prefill(talk, user)
            answer = yield from self._converse(talk)
        yield Done(answer)

    def _converse(self, talk: Conversation) -> Generator[Event | Chunk, None, Answer]:
        """Rounds of decoding and looking again, until one ends without a look."""
        turn = yield from self._decode(talk)
        while (yield from self._look_again(talk, turn)):
            turn = yield from self._decode(talk)
        return self._answer(talk)

    @contextmanager
    def _conversation(self, **request: Any) -> Iterator[Conversation]:
        cache = self._idle.pop() if self._idle else self.new_cache()
        try:
            yield Conversation(cache, Clock(self.model.device), **request)
        finally:
            cache.truncate(0, 0)
            self._idle.append(cache)

    def _prefill(self, talk: Conversation, user: list[int]) -> Row:
        if talk.image is not None:
            height, width, _ = talk.image.shape
            features, talk.grids = self._look(talk, [(0, 0, width, height)])
            talk.features = features[0]
            talk.ahead = perception.Ahead(self.model, talk.image) if self.speculate and self._may_look(talk) else None
        count = None if talk.image is None else len(talk.features)
        tokens = first_round(self.ids, self.tokenizer.encode(self.prompt.system), user, count)
        with talk.clock("prefill", tokens=len(tokens), lm_calls=1):
            yield self._chunk(talk, tokens, self._embed(tokens, talk.features), talk.grids)
        talk.header = talk.cache.length, talk.cache.next_position

    def _decode(self, talk: Conversation) -> Generator[Token | Chunk, None, Turn]:
        """Generate until the turn ends; the token that ends it is not fed."""
        turn, unprinted = Turn(), []
        talk.turns.append(turn)
        forced = deque(talk.forced.popleft() if talk.forced else ())
        while not turn.end:
            token = forced.popleft() if forced else talk.choose(talk.logits, talk.likeliest)
            if token is None:
                turn.end = "nan"
                talk.notices.append(
                    f"the logits behind {talk.cache.length} tokens are NaN: check the weights, and use bfloat16 or "
                    "float32 where float16 overflows"
                )
                break
            if token in self.ids.stop:
                turn.end = "stop"
            elif token == self.ids.action_start and self._may_look(talk):
                turn.end = "action"
            elif len(turn.ids) + 1 >= talk.max_new_tokens and not forced:
                turn.end = "length"
            elif talk.cache.length == talk.cache.capacity:
                turn.end = "capacity"
            elif self.ids.action is not None and talk.last == self.ids.action_start:
                token = self.ids.action  # the models never learned to predict it
            turn.ids.append(token)
            if talk.keep_logits:
                turn.logits.append(talk.logits)
            unprinted.append(token)
            text = self.tokenizer.decode(unprinted)
            if turn.end or not text.endswith("\ufffd"):  # the end of a character may still be missing
                unprinted.clear()
            yield Token(token, "" if unprinted else text)
            if not turn.end:
                with talk.clock("decode", tokens=1, lm_calls=1):
                    # The action token's own embedding is never used: its input is the state of the token before it.
                    yield self._chunk(talk, [token], talk.hidden if token == self.ids.action else None)
        return turn

    def _look_again(self, talk: Conversation, turn: Turn) -> Generator[Event | Chunk, None, bool]:
        """Take the look that the turn asks for, if any; whether another turn follows."""
        if turn.end == "action":
            yield Reencode(self.reencoder)
            look = yield from self._reencode(talk, turn)
        elif boxes := self._named_boxes(talk, turn):
            yield Region(boxes)
            look = yield from self._crop(talk, turn, boxes)
        else:
            return False
        if look is None:
            return False
        talk.looks.append(look)
        talk.header = talk.cache.length, talk.cache.next_position
        yield look
        return True

    def _reencode(self, talk: Conversation, turn: Turn) -> Generator[Chunk, None, Look | None]:
        encoder = self.model.encoder
        count = len(talk.features) if encoder is None else encoder.tokens
        tokens = action_round(self.ids, count)
        # The second round starts from the bare action span: text that led to it is forgotten.
        talk.cache.truncate(*talk.header)
        if not self._fits(talk, turn, 1 + len(tokens)):
            return None
        features = perception.reencode(self.model, talk.image, talk.features, talk.clock, talk.ahead)
        with talk.clock("perceive", tokens=1, lm_calls=1, features=count):
            yield self._chunk(talk, [self.ids.action_start], sample=False)
            control = self.control_state(talk.hidden)
            embeds = self._embed(tokens)
            embeds[0] = control[0]
            first = tokens.index(self.ids.kind_pad)
            perception.reencode_into(self.model, features, control, embeds, first, count)
        with talk.clock("append", tokens=len(tokens), lm_calls=1):
            yield self._chunk(talk, tokens, embeds)
        grids = talk.grids if encoder is None else (encoder.grid,)
        return Look(self.reencoder, (), grids, count, 1 + len(tokens))

    def _crop(self, talk: Conversation, turn: Turn, boxes: tuple[Box, ...]) -> Generator[Chunk, None, Look | None]:
        features, grids = self._look(talk, boxes)
        answer = turn.ids[:-1] if turn.end == "stop" else turn.ids
        again = self.tokenizer.encode(self.tokenizer.decode(answer))
        unfed = answer[len(turn.ids) - 1 :]
        if again != answer:
            # The second round reads the answer's text, and that text has other ids than were generated.
            talk.cache.truncate(*talk.header)
            unfed = again
        counts = [len(crop) for crop in features]
        tokens = unfed + region_round(self.ids, counts, self.tokenizer.encode)
        if not self._fits(talk, turn, len(tokens)):
            return None
        with talk.clock("append", tokens=len(tokens), lm_calls=1):
            yield self._chunk(talk, tokens, self._embed(tokens, torch.cat(features)), grids)
        return Look("region", boxes, grids, sum(counts), len(tokens))

    def _named_boxes(self, talk: Conversation, turn: Turn) -> tuple[Box, ...]:
        if talk.image is None or turn.end == "nan":
            return ()
        try:
            boxes = self._boxes(talk.image, turn.ids)
        except ValueError as error:
            if self._may_look(talk):
                talk.notices.append(f"no second look: {error}")
            return ()
        if self._may_look(talk):
            return boxes
        if boxes and turn.end == "stop":
            turn.end = "looks"
        return ()

    def _boxes(self, image: Tensor, tokens: Sequence[int]) -> tuple[Box, ...]:
        height, width, _ = image.shape
        return tuple(crop_box(span, width, height) for span in parse_region_ids(tokens, self.ids))

    def _may_look(self, talk: Conversation) -> bool:
        return talk.image is not None and len(talk.looks) < self.max_looks

    def _fits(self, talk: Conversation, turn: Turn, count: int) -> bool:
        needed = talk.cache.length + count
        if needed > talk.cache.capacity:
            turn.end = "capacity"
            talk.notices.append(
                f"no second look: the conversation would hold {needed} tokens, the cache's capacity is "
                f"{talk.cache.capacity}; give the engine capacity >= {needed}"
            )
        return needed <= talk.cache.capacity

    def _look(self, talk: Conversation, boxes: Sequence[Box]) -> tuple[list[Tensor], tuple[tuple[int, int], ...]]:
        return perception.look(self.model, talk.image, boxes, self.policy, talk.clock)

    def _embed(self, tokens: Sequence[int], features: Tensor | None = None) -> Tensor:
        """Input embeddings [T, H]; image pads take the rows of `features` in order."""
        ids = torch.tensor(tokens)
        embeds = self.model.language.embed(ids)
        if features is not None:
            embeds[(ids == self.ids.image_pad).nonzero().flatten().to(embeds.device)] = features
        return embeds

    def _chunk(
        self,
        talk: Conversation,
        tokens: Sequence[int],
        embeds: Tensor | None = None,
        grids: Sequence[tuple[int, int]] = (),
        sample: bool = True,
    ) -> Chunk:
        positions = self.positions(torch.tensor(tokens), grids, talk.cache.next_position)
        return Chunk(talk, tokens, embeds, positions, sample)

    def _answer(self, talk: Conversation) -> Answer:
        first, last = talk.turns[0], talk.turns[-1]
        text = self.tokenizer.decode(last.ids)
        return Answer(
            text=text if self.keep_prefix else text.removeprefix(ANSWER_PREFIX),
            ids=last.ids,
            first_text=self.tokenizer.decode(first.ids),
            finish_reason=last.end,
            looks=talk.looks,
            timings=talk.clock.stages,
            notices=talk.notices,
            logits=torch.stack(last.logits) if last.logits else None,
        )
