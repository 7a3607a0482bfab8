"""What a model has been fed: the cache of one conversation, and the positions that go with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vpt_kernels.live.family import Family, cache_argument, cache_length, capacity_of, new_cache, truncate


@dataclass(frozen=True)
class Pending:
    """Pictures of a chunk: grids (frames, rows, columns) in patches, and the model's arguments for their pixels."""

    grids: Sequence[Sequence[int]] = ()
    pixels: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        return sum(frames * rows * columns for frames, rows, columns in self.grids)


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

    def generate(self, ids: Sequence[int], arguments: Mapping[str, Any], pictures: Pending) -> Any:
        """Run the model's `generate` behind all of `ids`; those not fed yet, with their pictures, pass in one call."""
        tokens = torch.tensor([list(ids)], device=self._family.core.device)
        given = {"attention_mask": torch.ones_like(tokens), self._argument: self._cache, **arguments}
        positions, behind = self._family.positions(ids[self.length :], pictures.grids, self.next_position)
        new = {**self._family.kinds(tokens[:, self.length :]), **pictures.pixels} if pictures.grids else {}
        exchanged: AbstractContextManager[None] = nullcontext()
        if not self.length:
            given |= new  # `generate` numbers a conversation from its beginning as `positions` does
        elif new:
            exchanged = self._first_call({**new, "position_ids": positions[:, None]})
        with self._family.deltas(behind[-1] - len(ids)), exchanged:
            out = self._model.generate(input_ids=tokens, **given)
        more = cache_length(self._cache) - len(ids)
        self._advance([*behind, *range(behind[-1] + 1, behind[-1] + 1 + more)], pictures.patches)
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

    @contextmanager
    def _first_call(self, new: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the first call of the model with this cache inside these arguments, instead of those of their names.

        `generate` itself would number a chunk as text, and every version of it reads `position_ids` in another way.

        Raises:
            ValueError: no such call was made, so that nothing has seen the pictures.
        """
        handles: list[RemovableHandle] = []

        def end() -> None:
            while handles:
                handles.pop().remove()

        def exchanged(model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            # A call without our cache is another thread's. Inside a wrapper its argument may have another name.
            if not handles or all(value is not self._cache for value in named.values()):
                return arguments, named
            end()
            # From transformers 5.24 on: features of the pictures that `generate` was given, which are none.
            named.pop("mm_encoder_outputs", None)
            return arguments, {**named, **new}

        # What generates may be wrapped (by adapters, by torch.compile), and its `generate` then calls what is inside.
        for part in self._model.modules():
            if hasattr(type(part), "prepare_inputs_for_generation"):
                handles.append(part.register_forward_pre_hook(exchanged, with_kwargs=True))
        try:
            yield
            if handles:
                raise ValueError(
                    f"generate of this {type(self._model).__name__} calls no part of it with this conversation's cache "
                    "and does not see pictures of later turns; open the conversation over the model inside"
                )
        finally:
            end()

    def _advance(self, behind: Sequence[int], patches: int) -> None:
        self._next += behind
        self.counts["tokens"] += len(behind)
        self.counts["patches"] += patches
