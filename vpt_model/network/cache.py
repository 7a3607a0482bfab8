"""The key/value cache of one conversation: append, truncate, fork; never copied unless asked.

A token's slot (where its keys lie) and its rotary position are kept apart: an image of n tokens fills n slots but
advances the position by the larger side of its grid only, so `length` and `next_position` differ after an image.
"""

from __future__ import annotations

import torch

from vpt_model.config import ModelConfig


class KVCache:
    """Static, zero-initialised keys and values `[layers, capacity, kv_heads, head_dim]` of one conversation.

    length: tokens stored so far; the next token goes to slot `length`.
    slab, first: the keys and values of all caches that share this one's buffers, and this one's first slot there.
    next_position: the M-RoPE position of the next text token (one more than the largest position so far).
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._begin(_buffers(config, 1, capacity, dtype, device), 0, capacity)

    @classmethod
    def side_by_side(
        cls, count: int, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> list[KVCache]:
        """`count` caches, one behind the other in one pair of buffers, so that one launch can serve them all."""
        slab = _buffers(config, count, capacity, dtype, device)
        caches = [cls.__new__(cls) for _ in range(count)]
        for row, cache in enumerate(caches):
            cache._begin(slab, row * capacity, capacity)
        return caches

    def _begin(self, slab: tuple[torch.Tensor, torch.Tensor], first: int, capacity: int) -> None:
        self.slab, self.first = slab, first
        self.keys, self.values = (buffer[:, first : first + capacity] for buffer in slab)
        self.length = 0
        self.next_position = 0
        self._floor = 0
        self._parent: KVCache | None = None
        self._child: KVCache | None = None
        self._released = False

    @property
    def capacity(self) -> int:
        """Tokens that fit in the buffers."""
        return self.keys.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values: layers x kv_heads x head_dim x itemsize x 2."""
        return self.nbytes // self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers: capacity x layers x kv_heads x head_dim x itemsize x 2 (a fork shares its parent's)."""
        return self.keys.nbytes + self.values.nbytes

    def check(self, count: int) -> None:
        """Raise ValueError unless `count` more tokens may be written; nothing is changed."""
        self._check_owner("append to")
        if count < 0:
            raise ValueError(f"cannot append {count} tokens; the count must be 0 or more")
        needed = self.length + count
        if needed > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} tokens and {count} more make {needed}, but its capacity is "
                f"{self.capacity}: create it with capacity >= {needed}, or truncate it first"
            )

    def slots(self, count: int) -> torch.Tensor:
        """Slots of the next `count` tokens, int64 `[count]` on the cache's device; ValueError where `check` raises."""
        self.check(count)
        return torch.arange(self.length, self.length + count, device=self.keys.device)

    def advance(self, count: int, next_position: int) -> None:
        """Count `count` tokens, whose keys and values the caller has written to `slots(count)`, as stored."""
        self.check(count)
        self.length += count
        self.next_position = next_position

    def truncate(self, length: int, next_position: int) -> None:
        """Forget all tokens from slot `length` on. Their rows stay in memory until they are overwritten.

        Raises ValueError if `length` exceeds the stored length or reaches into rows that a fork only borrows.
        """
        self._check_owner("truncate")
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length} tokens; the cache holds {self.length}")
        if length < self._floor:
            raise ValueError(
                f"cannot truncate to {length} tokens: the first {self._floor} belong to the cache this one was forked "
                f"from; truncate to {self._floor} or more, or use fork(copy=True)"
            )
        self.length = length
        self.next_position = next_position

    def clear(self) -> None:
        """Forget everything; as `truncate(0, 0)`."""
        self.truncate(0, 0)

    def fork(self, copy: bool = False) -> KVCache:
        """A second conversation that starts from this one's tokens.

        copy=False: the fork writes its own tokens behind this cache's in the same buffers. Until `release()` of the
        fork, this cache can be read but neither appended to, truncated nor forked again. copy=True: new buffers of
        the same capacity with the stored rows copied; both live on independently.
        """
        self._check_owner("fork", shared=not copy)
        child = KVCache.__new__(KVCache)
        if copy:
            child._begin((torch.zeros_like(self.keys), torch.zeros_like(self.values)), 0, self.capacity)
            child.keys[:, : self.length] = self.keys[:, : self.length]
            child.values[:, : self.length] = self.values[:, : self.length]
        else:
            child._begin(self.slab, self.first, self.capacity)
            child._floor, child._parent = self.length, self
            self._child = child
        child.length, child.next_position = self.length, self.next_position
        return child

    def release(self) -> None:
        """Give the tail back to the cache this one was forked from; a released fork can no longer be used.

        Raises ValueError on a cache that is no live shared fork, or whose own fork is still live.
        """
        if self._parent is None:
            raise ValueError("only a live fork(copy=False) can be released; this cache owns its buffers")
        self._check_owner("release")
        self._parent._child = None
        self._released = True

    def _check_owner(self, action: str, shared: bool = True) -> None:
        if self._released:
            raise ValueError(f"cannot {action} a released fork; fork the original cache again")
        if shared and self._child is not None:
            raise ValueError(
                f"cannot {action} a cache while its fork is live, because both use the same rows: "
                f"release the fork or use fork(copy=True)"
            )


def _buffers(
    config: ModelConfig, count: int, capacity: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    if not 0 < capacity <= config.max_position_embeddings:
        raise ValueError(
            f"capacity is {capacity} tokens; it must lie in 1..max_position_embeddings = "
            f"{config.max_position_embeddings}: ask for a cache of that range"
        )
    shape = (config.num_hidden_layers, count * capacity, config.num_key_value_heads, config.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
