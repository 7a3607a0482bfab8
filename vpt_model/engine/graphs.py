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

from vpt_kernels import RegionPolicy
from vpt_model.engine import perception
from vpt_model.engine.requests import Append
from vpt_model.network.attention import Padded
from vpt_model.network.cache import KVCache
from vpt_model.network.capture import on_device, record
from vpt_model.network.language import LanguageModel
from vpt_model.network.model import Model
from vpt_model.network.tower_graphs import captured


class Bucket(NamedTuple):
    """The shape of a step: `rows` conversations of `tokens` each. sample: whether the last's logits are wanted."""

    rows: int
    tokens: int
    sample: bool


BUCKETS = (
    Bucket(1, 1, False),
    *(Bucket(rows, 1, True) for rows in (1, 2, 4, 8)),
    *(Bucket(1, tokens, True) for tokens in (16, 64, 72, 80, 96, 128, 192, 256, 272, 288, 320, 384, 448, 512)),
)
"""The trigger token of a look, whose logits nobody reads; decoding; a look, or a prompt, of one conversation."""
ROWS = 8
"""Conversations whose caches lie side by side; further ones run without graphs."""


def smallest(buckets: Iterable[Bucket], rows: int, tokens: int, sample: bool) -> Bucket | None:
    """Return the bucket with the fewest padded tokens that takes `rows` conversations of at most `tokens`, or None."""
    fitting = (b for b in buckets if b.rows >= rows and b.tokens >= tokens and b.sample == sample)
    return min(fitting, key=lambda bucket: bucket.rows * bucket.tokens, default=None)


class StepMetadata:
    """The integers of one step, int32, in one block so that one copy takes them to the device.

    tokens: [R · N], −1 where the embedding is given or the row is padding. positions: [3, R · N]. slots: [R · N], −1
    for padding. past, starts, counts: [R], as in `vpt_model.network.attention.attend`. Padding stands in front.
    """

    def __init__(self, bucket: Bucket, device: torch.device | str, pinned: bool = False) -> None:
        self.bucket, rows, total = bucket, bucket.rows, bucket.rows * bucket.tokens
        self.block = torch.zeros(5 * total + 3 * rows, dtype=torch.int32, device=device, pin_memory=pinned)
        self.tokens, positions, self.slots, self.past, self.starts, self.counts = self.block.split(
            [total, 3 * total, total, rows, rows, rows]
        )
        self.positions = positions.view(3, total)

    def follow(self, chosen: Tensor) -> None:
        """Become, after one token of each row, the integers of the next: `chosen` [R], one place further on.

        Padding stays padding.
        """
        rows = self.bucket.rows
        self.tokens.copy_(chosen)
        # Positions, slots and past lie behind each other.
        self.block[rows : 6 * rows].view(5, rows).add_(self.counts)

    def fill(self, appends: Sequence[Append]) -> list[slice]:
        """Take the integers of `appends`, one per row; the rest is padding. Where each one's tokens are."""
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
            begin = cache.first + cache.length
            self.slots[place] = torch.arange(begin, begin + count, device="cpu")
            self.starts[row], self.past[row], self.counts[row] = cache.first, cache.length, count
            places.append(place)
        return places


class Step:
    """One bucket over caches that lie side by side in `slab`: eager until it is captured."""

    def __init__(self, bucket: Bucket, language: LanguageModel, slab: tuple[Tensor, Tensor], capacity: int) -> None:
        self.bucket, self.language, self.slab, self.capacity = bucket, language, slab, capacity
        on_gpu = language.device.type == "cuda"
        self.host, self.device = StepMetadata(bucket, "cpu", on_gpu), StepMetadata(bucket, language.device)
        shape = (bucket.rows * bucket.tokens, language.config.hidden_size)
        self.given = torch.zeros(shape, dtype=language.dtype, device=language.device)
        tickets = max(language.config.hidden_size, shape[0] * language.config.num_attention_heads)
        self.tickets = torch.zeros(tickets, dtype=torch.int32, device=language.device)
        self.copied = torch.cuda.Event() if on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether it feeds one token of each row and chooses the next, which it leaves to be fed by another replay."""
        return self.bucket.tokens == 1 and self.bucket.sample

    def __call__(self, appends: Sequence[Append]) -> tuple[Tensor, ...]:
        """Feed the tokens: the last token's hidden states [R, H] and, if the bucket samples, logits and `greedy`."""
        # Copy, event and replay on one stream, that of the model's device, whichever device is current.
        with on_device(self.given):
            self.upload(appends)
            return self.again()

    def again(self) -> tuple[Tensor, ...]:
        """Feed what the integers on the device say: behind a step that decodes, what it chose."""
        with on_device(self.given):
            if self.graph is None:
                return self.run()
            self.graph.replay()
            return tuple(output.clone() for output in self.outputs)

    def upload(self, appends: Sequence[Append]) -> None:
        if self.copied is not None and not self.copied.query():
            # The copy before this one may still be reading the pinned block, unless a token was read since.
            self.copied.synchronize()
        places = self.host.fill(appends)
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
        if self.decodes:
            metadata.follow(chosen)
        return hidden, logits, chosen

    def capture(self, pool: object) -> None:
        self.upload(())
        self.graph, self.outputs = record(self.run, pool)


class Graphs:
    """The language model's steps over `caches`, which lie side by side; what fits no bucket is left to the caller."""

    def __init__(
        self, language: LanguageModel, capacity: int, rows: int = ROWS, buckets: Sequence[Bucket] = BUCKETS
    ) -> None:
        self.caches = KVCache.side_by_side(rows, language.config, capacity, language.dtype, language.device)
        self.slab = self.caches[0].slab
        fitting = [bucket for bucket in buckets if bucket.rows <= rows and bucket.tokens <= capacity]
        self.steps = {bucket: Step(bucket, language, self.slab, capacity) for bucket in fitting}

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
        for bucket, step in sorted(self.steps.items(), key=lambda item: -item[0].rows * item[0].tokens):
            begin = time.perf_counter()
            step.capture(pool)
            torch.cuda.current_stream().synchronize()
            sampled = "" if bucket.sample else ", no logits"
            seconds[f"{bucket.rows} x {bucket.tokens} tokens{sampled}"] = time.perf_counter() - begin
        return seconds


def warmed(model: Model, capacity: int, policy: RegionPolicy) -> tuple[Model, Graphs, dict[str, float]]:
    """Return the model with its towers captured, the language model's captured steps, and the seconds of each capture.

    What is in no graph is run once. Raises ValueError as `Graphs.capture` does.
    """
    with torch.inference_mode():
        graphs = Graphs(model.language, capacity)
        seconds = graphs.capture()
        model, towers = captured(model)
        begin = time.perf_counter()
        perception.rehearse(model, policy)
        torch.cuda.current_stream().synchronize()
        seconds["crop, embedding and projector"] = time.perf_counter() - begin
    return model, graphs, seconds | towers
