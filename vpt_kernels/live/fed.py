"""What a model has been fed: the cache of one conversation, and the positions that go with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vpt_kernels.live.family import Family, cache_argument, cache_length, capacity_of, new_cache, truncate


class Fed:
    """The only user of a conversation's cache.

    Attributes:
        counts: what has passed the model: "tokens" (language model) and "patches" (vision tower).
    """

    def __init__(self, model: Any, family: Family, cache: Any, capacity: int | None) -> None:
        self._model, self._family = model, family
        self._cache, self._argument = new_cache(model, cache, capacity), cache_argument(model)
        self._next = [0]  # the first token's position, then the position behind every fed token
        self.counts = {"tokens": 0, "patches": 0}

    @property
    def length(self) -> int:
        return len(self._next) - 1

    @property
    def next_position(self) -> int:
        return self._next[-1]

    def feed(self, ids: Sequence[int], grids: Sequence[Sequence[int]], pixels: Mapping[str, Tensor]) -> None:
        """Append a chunk and its images in one call: grids (frames, rows, columns), pixels the arguments for them."""
        if not ids:
            return
        positions, behind = self._family.positions(ids, grids, self.next_position)
        tokens = torch.tensor([list(ids)], device=positions.device)
        given = {**pixels, **(self._family.kinds(tokens) if grids else {}), self._argument: self._cache}
        self._model(tokens, position_ids=positions[:, None], logits_to_keep=1, **given)
        self._advance(behind, sum(frames * rows * columns for frames, rows, columns in grids))

    def generate(self, ids: Sequence[int], arguments: Mapping[str, Any]) -> Any:
        """Run the model's `generate` behind all of `ids`; the last one or more, which are text, have not been fed."""
        tokens = torch.tensor([list(ids)], device=self._family.core.device)
        given = {"attention_mask": torch.ones_like(tokens), self._argument: self._cache, **arguments}
        with self._family.deltas(self.next_position - self.length):
            out = self._model.generate(input_ids=tokens, **given)
        count = cache_length(self._cache) - self.length
        self._advance(range(self.next_position + 1, self.next_position + 1 + count), 0)
        return out

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; raises ValueError where a layer of the cache cannot."""
        if length < self.length:
            truncate(self._cache, length)
            del self._next[length + 1 :]

    def check_capacity(self, tokens: int) -> None:
        """Raise ValueError if a cache of fixed size cannot hold `tokens` in all."""
        capacity = capacity_of(self._cache)
        if capacity is not None and tokens > capacity:
            raise ValueError(
                f"the conversation would hold up to {tokens} tokens, and the static cache holds {capacity}: open it "
                "with more capacity, or ask for fewer new tokens"
            )

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Leave the cache and the counts as they were if anything is raised inside.

        Raises:
            ValueError: the cache holds other tokens than were fed, because an undoing failed or somebody changed it.
        """
        before, counts = self.length, dict(self.counts)
        if cache_length(self._cache) != before:
            raise ValueError(
                f"the cache holds {cache_length(self._cache)} tokens and {before} were fed: something else changed it; "
                "open a new conversation"
            )
        try:
            yield
        except BaseException:
            truncate(self._cache, before)
            del self._next[before + 1 :]
            self.counts = counts
            raise

    def _advance(self, behind: Sequence[int], patches: int) -> None:
        self._next += behind
        self.counts["tokens"] += len(behind)
        self.counts["patches"] += patches
