"""The key/value cache of one conversation: append, truncate, fork, grow; rows are never moved or copied.

A token's slot (where its keys lie) and its rotary position are kept apart: an image of n tokens fills n slots but
advances the position by the larger side of its grid only, so `length` and `next_position` differ after an image.

Layout: rows that are only read, in the order of their tokens, then one buffer that is written to. A fork reads its
parent's rows where they lie and has a buffer of its own; a cache that grows reads its full buffer and goes on in a new
one. Attention runs over each part and merges by log-sum-exp (`vpt_model.network.attention`). Why parts and not pages
behind a block table: a part is contiguous, so the CPU's kernels, the operators, flash-attn and the CUDA graphs read it
as it is, and a conversation that is neither forked nor grown, every one of `Engine.ask`, pays nothing; pages would cost
each of them a gather per layer and token, or a kernel of their own. The price: attention calls grow with the depth of
a tree of forks (one part a generation), and CUDA graphs, whose rows are one buffer, take no conversation of several
parts.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from vpt_model.config import ModelConfig


class Rows(NamedTuple):
    """Keys and values `[layers, n, kv_heads, head_dim]` that are only read. made: bytes that this cache made for them.

    hold: kept as long as somebody reads them, so that whoever could write to them knows.
    """

    keys: torch.Tensor
    values: torch.Tensor
    made: int
    hold: object


class _Hold:
    """Lives as long as a fork that reads the rows."""


class KVCache:
    """Zero-initialised keys and values `[layers, rows, kv_heads, head_dim]` of one conversation.

    length: tokens stored so far. next_position: the M-RoPE position of the next text token (one more than the largest
    position so far). capacity: tokens that may be stored. shared: rows of the first `floor` tokens, which are only
    read. keys, values: of the tokens behind them, in buffers for `rows` tokens. slab, first: the keys and values of all
    caches that share this one's buffers, and this one's first row there.

    rows: of the buffers at first, all of `capacity` if None; `reserve` adds to them.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rows: int | None = None,
    ) -> None:
        _check_capacity(config, capacity)
        self._begin(_buffers(config, min(rows or capacity, capacity), dtype, device), 0, capacity)
        self.capacity = capacity

    @classmethod
    def side_by_side(
        cls, count: int, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> list[KVCache]:
        """Return `count` caches, one behind the other in one pair of buffers, so that one launch can serve them all."""
        _check_capacity(config, capacity)
        slab = _buffers(config, count * capacity, dtype, device)
        caches = [cls.__new__(cls) for _ in range(count)]
        for row, cache in enumerate(caches):
            cache._begin(slab, row * capacity, capacity)
            cache.capacity = capacity
        return caches

    def _begin(self, slab: tuple[torch.Tensor, torch.Tensor], first: int, rows: int) -> None:
        self._write_to(slab, first, rows)
        self.length = self.next_position = self.floor = 0
        self.shared: tuple[Rows, ...] = ()

    def _write_to(self, slab: tuple[torch.Tensor, torch.Tensor], first: int, rows: int) -> None:
        self.slab, self.first = slab, first
        self.keys, self.values = (buffer[:, first : first + rows] for buffer in slab)
        self._lent = 0  # rows of the buffers that forks read, while `_hold` lives
        self._hold: weakref.ref[_Hold] | None = None

    @property
    def rows(self) -> int:
        """Tokens that fit in the buffers that are written to."""
        return self.keys.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values: layers x kv_heads x head_dim x itemsize x 2."""
        return (self.keys.nbytes + self.values.nbytes) // self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that this cache made: rows x layers x kv_heads x head_dim x itemsize x 2.

        What a fork reads of its parent counts as the parent's.
        """
        return self.keys.nbytes + self.values.nbytes + sum(rows.made for rows in self.shared)

    def check(self, count: int) -> None:
        """Raise ValueError unless `count` more tokens may be written; nothing is changed."""
        if count < 0:
            raise ValueError(f"cannot append {count} tokens; the count must be 0 or more")
        needed = self.length + count
        if needed > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} tokens and {count} more make {needed}, but its capacity is "
                f"{self.capacity}: create it with capacity >= {needed}, or truncate it first"
            )

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens. Where they do not fit, what is stored stays where it is and a new buffer
        is begun, twice as large. Raises ValueError where `check` does."""
        self.check(count)
        if self.length - self.floor + count > self.rows:
            self._renew(min(max(2 * self.rows, count), self.capacity - self.length))

    def slots(self, count: int) -> torch.Tensor:
        """Return the rows of `keys` and `values` for the next `count` tokens, int64 `[count]` on their device.

        Raises ValueError where `check` does, or if there is no room before `reserve(count)`.
        """
        self.check(count)
        begin = self.length - self.floor
        if begin + count > self.rows:
            raise ValueError(f"{begin} of {self.rows} rows are used and {count} more do not fit: call reserve({count})")
        return torch.arange(begin, begin + count, device=self.keys.device)

    def advance(self, count: int, next_position: int) -> None:
        """Count `count` tokens, whose keys and values the caller has written to `slots(count)`, as stored."""
        self.check(count)
        self.length += count
        self.next_position = next_position

    def truncate(self, length: int, next_position: int) -> None:
        """Forget all tokens from `length` on. Their rows stay in memory until they are overwritten.

        Rows that a fork reads are never overwritten: this cache goes on in a new buffer. Raises ValueError if `length`
        exceeds the stored length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length} tokens; the cache holds {self.length}")
        while length < self.floor:
            *rest, last = self.shared
            kept = length - (self.floor - last.keys.shape[1])
            if kept > 0:
                rest.append(last._replace(keys=last.keys[:, :kept], values=last.values[:, :kept]))
            self.shared, self.floor = tuple(rest), self.floor - last.keys.shape[1] + max(kept, 0)
        self.length, self.next_position = length, next_position
        if self._hold is not None and self.length - self.floor < self._lent and self._hold() is not None:
            self._renew(self.rows)

    def clear(self) -> None:
        """Forget everything; as `truncate(0, 0)`."""
        self.truncate(0, 0)

    def fork(self, rows: int) -> KVCache:
        """Return a second conversation that begins behind this one's tokens, which it reads where they are.

        rows: of its own buffer at first. Both can be appended to, truncated and forked further.
        """
        fork = KVCache.__new__(KVCache)
        fork._begin(self._new_buffers(rows), 0, rows)
        hold = self._hold and self._hold()
        if hold is None:
            hold = _Hold()
            self._hold = weakref.ref(hold)
        self._lent = self.length - self.floor
        fork.shared = tuple(rows._replace(made=0) for rows in (*self.shared, *self._stored(0, hold)))
        fork.length = fork.floor = self.length
        fork.next_position, fork.capacity = self.next_position, self.capacity
        return fork

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a copy of all keys and values `[layers, length, kv_heads, head_dim]`."""
        parts = [*self.shared, *self._stored(0, None)]
        if not parts:
            return self.keys[:, :0].clone(), self.values[:, :0].clone()
        return torch.cat([part.keys for part in parts], 1), torch.cat([part.values for part in parts], 1)

    def restore(self, keys: torch.Tensor, values: torch.Tensor, next_position: int) -> None:
        """Store what `gather` returned, in an empty cache; ValueError if this one is not, or if there is no room."""
        if self.length:
            raise ValueError(f"the cache holds {self.length} tokens: clear it first")
        count = keys.shape[1]
        self.reserve(count)
        self.keys[:, :count].copy_(keys)
        self.values[:, :count].copy_(values)
        self.length, self.next_position = count, next_position

    def _stored(self, made: int, hold: object) -> tuple[Rows, ...]:
        used = self.length - self.floor
        return (Rows(self.keys[:, :used], self.values[:, :used], made, hold),) if used else ()

    def _renew(self, rows: int) -> None:
        """Read only what is stored from now on, and write to new buffers."""
        hold = self._hold and self._hold()
        self.shared += self._stored(self.keys.nbytes + self.values.nbytes, hold)
        self.floor = self.length
        self._write_to(self._new_buffers(rows), 0, rows)

    def _new_buffers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        if rows < 1:
            raise ValueError(f"rows is {rows}; a buffer needs at least one row")
        shape = (len(self.keys), rows, *self.keys.shape[2:])
        with torch.inference_mode(False):
            return self.keys.new_zeros(shape), self.keys.new_zeros(shape)


def _check_capacity(config: ModelConfig, capacity: int) -> None:
    if not 0 < capacity <= config.max_position_embeddings:
        raise ValueError(
            f"capacity is {capacity} tokens; it must lie in 1..max_position_embeddings = "
            f"{config.max_position_embeddings}: ask for a cache of that range"
        )


def _buffers(
    config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (config.num_hidden_layers, rows, config.num_key_value_heads, config.head_dim)
    # Buffers outlive the calls that make them: tensors of inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
