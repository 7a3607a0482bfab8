"""Watchers of everything torch runs: what touches a cache's memory, how much memory is alive, what the host reads."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpt_model.network.cache import KVCache

VIEWS = ("select", "slice", "transpose", "unsqueeze", "view", "expand", "unflatten", "as_strided", "detach", "alias")


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


class CacheTraffic(TorchDispatchMode):
    """Everything that touches the storage of `caches`: rows appended, keys read by attention, and anything else.

    appended: rows per call. read: keys per call. other: names of operations that neither append, attend nor view;
    a copy, a concatenation or a change of layout is one.
    """

    def __init__(self, caches: Iterable[KVCache]) -> None:
        super().__init__()
        self.storages = {part.untyped_storage().data_ptr() for cache in caches for part in (cache.keys, cache.values)}
        self.appended: list[int] = []
        self.read: list[int] = []
        self.other: list[str] = []

    def touches(self, *trees: Any) -> bool:
        return any(x.untyped_storage().data_ptr() in self.storages for x in tensors(*trees))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.touches(args, kwargs):
            return result
        name = function.overloadpacket.__name__
        if name == "append_visual_kv_":
            self.appended.append(len(args[5]))
        elif name == "cached_attention":
            self.read.append(len(args[1]))
        elif name == "scaled_dot_product_attention":
            # The composed form of attention would repeat the keys of every group of heads: a copy of the cache.
            options = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False} | kwargs
            given = dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:]))
            fused = torch._fused_sdp_choice(*args[:3], **(options | given)) != 0
            (self.read if fused else self.other).append(args[1].shape[-2] if fused else "composed attention")
        elif name not in VIEWS or not self.touches(result):
            self.other.append(name)
        return result


class LiveMemory(TorchDispatchMode):
    """Bytes of storages made while it is active: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def _forget(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tensors(args, kwargs)}
        result = function(*args, **(kwargs or {}))
        for x in tensors(result):
            storage = x.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


class Reads(TorchDispatchMode):
    """Operations whose result, or its shape, the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags.intersection(function.tags):
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))
