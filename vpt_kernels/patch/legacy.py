"""What only old transformers need: caches of two lists, angles of three axes, attentions that hand their cache on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vpt_kernels.guard import OwnForward

ROTATIONS = ("apply_multimodal_rotary_pos_emb",)
"""Before transformers 5: takes cos and sin [3, B, S, D] and the sections in which it mixes them."""
CACHES = ("past_key_value",)
"""Before transformers 4.56."""


class LegacyLayer:
    """A layer of the `DynamicCache` before transformers 4.56, two lists of tensors, with a `DynamicLayer`'s names."""

    def __init__(self, cache: Any, index: int) -> None:
        self._cache, self._index = cache, index

    @property
    def is_initialized(self) -> bool:
        return len(self._cache.key_cache) > self._index

    @property
    def keys(self) -> Tensor | None:
        return self._cache.key_cache[self._index] if self.is_initialized else None

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        if self._index == 0:
            self._cache._seen_tokens += keys.shape[-2] - self.get_seq_length()
        self._cache.key_cache[self._index] = keys

    @property
    def values(self) -> Tensor | None:
        return self._cache.value_cache[self._index] if self.is_initialized else None

    @values.setter
    def values(self, values: Tensor) -> None:
        self._cache.value_cache[self._index] = values

    def get_seq_length(self) -> int:
        keys = self.keys
        return 0 if keys is None else keys.shape[-2]

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        self._cache.key_cache.append(keys)
        self._cache.value_cache.append(values)


def layer(cache: Any, index: int) -> LegacyLayer:
    """Return the layer of a cache without layers; raises OwnForward where it is not the dynamic one."""
    kind = type(cache)
    if kind.__name__ != "DynamicCache" or not hasattr(cache, "key_cache"):
        raise OwnForward(f"a {kind.__name__} has no layers")
    update = vars(kind).get("update")
    if "update" in vars(cache) or getattr(update, "__globals__", {}).get("__name__") != kind.__module__:
        raise OwnForward(f"update of {kind.__name__} is not its own")
    return LegacyLayer(cache, index)


def handed_on(output: Any, stand_in: Any, cache: Any) -> Any:
    """Return the attention's output with the caller's cache in it: before transformers 5 an attention returned its
    cache.
    """
    if type(output) is tuple and any(part is stand_in for part in output):
        return tuple(cache if part is stand_in else part for part in output)
    return output
