"""Steps of fixed shape that a GPU replays without the host: buckets, padding, and CUDA graphs over them.

A bucket is a number of conversations and of new tokens each. What is fed is padded to the smallest bucket that takes
it: padding has slot −1, so that it is not stored, and attention does not see it. Buckets and padding are tested on the
CPU, where a step runs without a graph; capture and replay have not run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vpt_kernels import RegionPolicy, control_cross_attention_into
from vpt_model.engine import perception
from vpt_model.engine.requests import Append
from vpt_model.engine.sampling import DRAWS, drawn
from vpt_model.network.attention import Padded
from vpt_model.network.cache import KVCache
from vpt_model.network.capture import on_device, record
from vpt_model.network.encoders import DinoEncoder, SamEncoder
from vpt_model.network.language import LanguageModel
from vpt_model.network.model import Model
from vpt_model.network.tower_graphs import captured

Encoder = DinoEncoder | SamEncoder


class Bucket(NamedTuple):
    """The shape of a step: `rows` conversations of `tokens` each. sample: whether the last's logits are wanted.

    draw: whether the next tokens are drawn from them, or all are the most probable.
    """

    rows: int
    tokens: int
    sample: bool
    draw: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.tokens} tokens{', drawn' * self.draw}{'' if self.sample else ', no logits'}"


TRIGGER = Bucket(1, 1, False)
"""The trigger token of a look that re-encodes, whose logits nobody reads."""
BUCKETS = (
    TRIGGER,
    *(Bucket(rows, 1, True, draw) for draw in (False, True) for rows in (1, 2, 4, 8)),
    *(Bucket(1, tokens, True) for tokens in (16, 64, 72, 80, 96, 128, 192, 256, 272, 288, 320, 384, 448, 512)),
)
"""A trigger; decoding; a look, or a prompt, of one conversation, whose first token is drawn behind the step."""
ROWS = 8
"""Conversations whose caches lie side by side; further ones run without graphs."""


def smallest(buckets: Iterable[Bucket], rows: int, tokens: int, sample: bool, draw: bool = False) -> Bucket | None:
    """Return the bucket with the fewest padded tokens that takes `rows` conversations of at most `tokens`, or None."""
    wanted = sample, draw
    fitting = (b for b in buckets if b.rows >= rows and b.tokens >= tokens and (b.sample, b.draw) == wanted)
    return min(fitting, key=lambda bucket: bucket.rows * bucket.tokens, default=None)


class StepMetadata:
    """The numbers of one step, in one block of int32 so that one copy takes them to the device.

    tokens: [R · N], −1 where the embedding is given or the row is padding. positions: [3, R · N]. slots: [R · N], −1
    for padding. past, starts, counts: [R], as in `vpt_model.network.attention.attend`. Padding stands in front.
    targets: rows of `given` to which what was seen is written, of a step that does (`vpt_model.engine.looks`).
    Of a step that draws: limits, float64 [3, R], of each row's sampler; draws, float64 [R, DRAWS], of its next tokens;
    spent: [R], how many of these lie behind it. Greedy rows have limits 0.
    """

    def __init__(self, bucket: Bucket, device: torch.device | str, pinned: bool = False, targets: int = 0) -> None:
        self.bucket, rows, total = bucket, bucket.rows, bucket.rows * bucket.tokens
        doubles = [3 * rows, DRAWS * rows] if bucket.draw else [0, 0]
        parts = [2 * sum(doubles), total, 3 * total, total, rows, rows, rows, rows, targets]
        self.block = torch.zeros(sum(parts), dtype=torch.int32, device=device, pin_memory=pinned)
        # Doubles first, where they are aligned.
        of_samplers, self.tokens, positions, self.slots, *lengths, self.targets = self.block.split(parts)
        self.past, self.spent, self.starts, self.counts = lengths
        self.positions = positions.view(3, total)
        limits, draws = of_samplers.view(torch.float64).split(doubles)
        self.limits, self.draws = limits.view(3, -1), draws.view(rows, -1)

    def draw(self, logits: Tensor, argmax_tokens: Tensor) -> Tensor:
        """Return the next token of each row, as `drawn` does."""
        return drawn(logits, argmax_tokens, self.limits, self.draws.gather(1, self.spent[:, None].long())[:, 0])

    def follow(self, chosen: Tensor) -> None:
        """Become, after one token of each row, the integers of the next: `chosen` [R], one place further on.

        Padding stays padding.
        """
        self.tokens.copy_(chosen)
        # Positions, slots, past and what is spent of the draws lie behind each other.
        begin, rows = self.positions.storage_offset(), self.bucket.rows
        self.block[begin : begin + 6 * rows].view(6, rows).add_(self.counts)

    def fill(self, appends: Sequence[Append], behind: int = 0) -> list[slice]:
        """Take the integers of `appends`, one per row; the rest is padding. Where each one's tokens are.

        behind: tokens that will have been fed first.
        """
        self.block.zero_()
        self.tokens.fill_(-1)
        self.slots.fill_(-1)
        places = []
        for row, append in enumerate(appends):
            cache, count = append.conversation.cache, len(append.tokens)
            end = (row + 1) * self.bucket.tokens
            place = slice(end - count, end)
            if append.embeds is None:
                self.tokens[place] = torch.tensor(append.tokens, device="cpu")
            self.positions[:, place] = append.positions
            past = cache.length + behind
            self.slots[place] = torch.arange(cache.first + past, cache.first + past + count, device="cpu")
            self.starts[row], self.past[row], self.counts[row] = cache.first, past, count
            if self.bucket.draw and append.sampler is not None and not append.sampler.is_greedy:
                self.limits[:, row] = torch.tensor(append.sampler.limits, device="cpu", dtype=torch.float64)
                self.draws[row] = append.sampler.draws(DRAWS)
            places.append(place)
        return places


class Step:
    """One bucket over caches that lie side by side in `slab`: eager until it is captured.

    given: embeddings [≥ R · N, H] of tokens that have no id; the step reads the last R · N rows. Steps that share it
    find there what another one has left.
    """

    def __init__(
        self,
        bucket: Bucket,
        language: LanguageModel,
        slab: tuple[Tensor, Tensor],
        capacity: int,
        given: Tensor | None = None,
        targets: int = 0,
    ) -> None:
        self.bucket, self.language, self.slab, self.capacity = bucket, language, slab, capacity
        on_gpu, total = language.device.type == "cuda", bucket.rows * bucket.tokens
        self.host = StepMetadata(bucket, "cpu", on_gpu, targets)
        self.device = StepMetadata(bucket, language.device, targets=targets)
        self.given = (embeddings(language, total) if given is None else given)[-total:]
        tickets = max(language.config.hidden_size, total * language.config.num_attention_heads)
        self.tickets = torch.zeros(tickets, dtype=torch.int32, device=language.device)
        self.copied = torch.cuda.Event() if on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether it feeds one token of each row and chooses the next, which it leaves to be fed by another replay."""
        return self.bucket.tokens == 1 and self.bucket.sample

    def __call__(self, appends: Sequence[Append]) -> tuple[Tensor, ...]:
        """Feed the tokens: the last token's hidden states [R, H] and, if the bucket samples, logits and the next token:
        the most probable one or, if the bucket draws, that of the row's sampler.
        """
        # Copy, event and replay on one stream, that of the model's device, whichever device is current.
        with on_device(self.given):
            self.upload(appends)
            return self.again()

    def again(self) -> tuple[Tensor, ...]:
        """Feed what the integers on the device say: behind a step that decodes, what it chose."""
        with on_device(self.given):
            outputs = self.replay()
            return outputs if self.graph is None else tuple(output.clone() for output in outputs)

    def replay(self) -> tuple[Tensor, ...]:
        """Do what `again` does, on the current stream; the next replay may write to what is returned."""
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.outputs

    def upload(self, appends: Sequence[Append], behind: int = 0, targets: Tensor | None = None) -> None:
        """Take integers, as `StepMetadata.fill` does, and embeddings to the device; nobody waits for the copies.

        targets: of a step that has some, int32 on the host; without any it writes to the first row of `given`.
        """
        if self.copied is not None and not self.copied.query():
            # The copy before this one may still be reading the pinned block, unless a token was read since.
            self.copied.synchronize()
        places = self.host.fill(appends, behind)
        if targets is not None:
            self.host.targets[: len(targets)] = targets
        self.device.block.copy_(self.host.block, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        for append, place in zip(appends, places, strict=True):
            if append.embeds is not None:
                self.given[place] = append.embeds

    def run(self) -> tuple[Tensor, ...]:
        """Run what a graph holds: nothing here waits for the device or depends on a value."""
        metadata, language = self.device, self.language
        embeds = language.embed(metadata.tokens.clamp_min(0))
        x = torch.where((metadata.tokens >= 0)[:, None], embeds, self.given)
        lengths = (metadata.starts, metadata.past, metadata.counts)
        attend = Padded(
            *self.slab, self.capacity, metadata.positions, metadata.slots, lengths, language.rotary, self.tickets
        )
        hidden = language.run(x, attend).unflatten(0, (self.bucket.rows, -1))[:, -1]
        if not self.bucket.sample:
            return (hidden,)
        logits, chosen = language.choose(hidden, self.tickets)
        if self.bucket.draw:
            chosen = metadata.draw(logits, chosen)
        if self.decodes:
            metadata.follow(chosen)
        return hidden, logits, chosen

    def capture(self, pool: object) -> None:
        self.upload(())
        self.graph, self.outputs = record(self.run, pool)


class Trigger(Step):
    """The trigger token of a look that re-encodes, and the picture under the state that it leaves.

    State and picture are written to the rows of `given` that the targets name, the state's first: where the step that
    is replayed next reads the embeddings of its tokens. inputs: the picture as the projector reads it or, with an
    encoder, its patch embeddings; what lies behind them has no target.
    """

    def __init__(
        self, model: Model, slab: tuple[Tensor, Tensor], capacity: int, given: Tensor, encoder: Encoder | None = None
    ) -> None:
        assert model.projector is not None, "a model without a projector has no action tokens"
        self.projector, self.encoder, self.all_given = model.projector, encoder, given
        if model.encoder is None:
            self.inputs = embeddings(model.language, len(given) - 1)
            room = len(self.inputs)
        else:
            room, side = model.encoder.tokens, model.encoder
            patches = torch.zeros(side.grid[0] * side.grid[1], side.width, dtype=side.dtype, device=side.device)
            # Its features have no other shape than it gives them.
            self.inputs = patches if encoder is not None else torch.zeros_like(side(patches))
        super().__init__(TRIGGER, model.language, slab, capacity, given, targets=1 + room)

    def run(self) -> tuple[Tensor, ...]:
        (hidden,) = super().run()
        features = self.inputs if self.encoder is None else self.encoder(self.inputs)
        rows = self.device.targets
        self.all_given.index_copy_(0, rows[:1].long(), hidden)
        control_cross_attention_into(features, hidden, self.projector, self.all_given, rows[1:])
        return (hidden,)


def embeddings(language: LanguageModel, rows: int) -> Tensor:
    """Return [rows, H] for embeddings."""
    return torch.zeros(rows, language.config.hidden_size, dtype=language.dtype, device=language.device)


class Graphs:
    """The language model's steps over `caches`, which lie side by side; what fits no bucket is left to the caller.

    given: embeddings that all steps share, behind a row that none reads. trigger, encoding: the trigger's step, and the
    one with a re-encoder in it, where the model has any.
    """

    def __init__(self, model: Model, capacity: int, rows: int = ROWS, buckets: Sequence[Bucket] = BUCKETS) -> None:
        language = model.language
        self.caches = KVCache.side_by_side(rows, language.config, capacity, language.dtype, language.device)
        self.slab = self.caches[0].slab
        fitting = [bucket for bucket in buckets if bucket.rows <= rows and bucket.tokens <= capacity]
        self.given = embeddings(language, 1 + max(bucket.rows * bucket.tokens for bucket in fitting))
        place = self.slab, capacity, self.given
        self.steps = {bucket: Step(bucket, language, *place) for bucket in fitting if bucket != TRIGGER}
        self.trigger: Trigger | None = None
        self.encoding: Trigger | None = None
        if TRIGGER in fitting and model.projector is not None:
            self.trigger = self.steps[TRIGGER] = Trigger(model, *place)
            self.encoding = Trigger(model, *place, model.encoder) if model.encoder is not None else None

    def named(self) -> dict[str, Step]:
        """Return all steps by what they take."""
        named = {str(bucket): step for bucket, step in self.steps.items()}
        return named if self.encoding is None else named | {f"{TRIGGER}, re-encoder": self.encoding}

    def capture(self) -> dict[str, float]:
        """Record every step, the largest first so that the others reuse its memory; seconds of each.

        Raises ValueError if the model is not on the current GPU, whose streams and graphs these are.
        """
        device = self.caches[0].keys.device
        if device.index != torch.cuda.current_device():
            raise ValueError(
                f"the model is on {device} and the current device is {torch.cuda.current_device()}: "
                f"call torch.cuda.set_device({device.index}) first, or move the model"
            )
        pool, seconds = torch.cuda.graph_pool_handle(), {}
        for name, step in sorted(self.named().items(), key=lambda item: -item[1].bucket.rows * item[1].bucket.tokens):
            begin = time.perf_counter()
            step.capture(pool)
            torch.cuda.current_stream().synchronize()
            seconds[name] = time.perf_counter() - begin
        return seconds


def warmed(model: Model, capacity: int, policy: RegionPolicy) -> tuple[Model, Graphs, dict[str, float]]:
    """Return the model with its towers captured, the language model's captured steps, and the seconds of each capture.

    What is in no graph is run once. Raises ValueError as `Graphs.capture` does.
    """
    with torch.inference_mode():
        graphs = Graphs(model, capacity)
        seconds = graphs.capture()
        model, towers = captured(model, graphs.given)
        begin = time.perf_counter()
        perception.rehearse(model, policy)
        torch.cuda.current_stream().synchronize()
        seconds["crop, embedding and projector"] = time.perf_counter() - begin
    return model, graphs, seconds | towers
