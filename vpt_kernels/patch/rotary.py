"""Rotary embedding and cache update of a foreign attention through `append_visual_kv_`.

The attention's own forward runs, with two things exchanged: the function it calls to rotate q and k only remembers q,
and the cache it is given rotates and appends when it is updated. Everything else, projections, norms, masks and the
attention itself, is the model's code, whatever its version.
"""

from __future__ import annotations

from collections import Counter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from vpt_kernels.caches import LAYERS, append_rows_, page_slots
from vpt_kernels.patch.rules import Forward, Rule, lacks

ROTATIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
"""What an attention calls to rotate: with cos and sin [B, S, D] already mixed from three positions; before
transformers 5, with [3, B, S, D] and the sections."""
CACHES = ("past_key_values", "past_key_value")


class Rotations(tuple):
    """(cos, sin) of one forward call of the model, and what its layers derive from them, computed once."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self._slots: dict[tuple, Tensor] = {}
        self._rotations: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def slots(self, *place: Any) -> Tensor:
        """`page_slots`, whose arguments are the same in every layer."""
        if place not in self._slots:
            self._slots[place] = page_slots(*place)
        return self._slots[place]

    def of(self, batch: int, count: int) -> tuple[Tensor, Tensor]:
        """The kernel's table, one row per angle, and the positions [3, batch · count] that read it.

        A batch or a number of tokens of one is that of every row or token, as where the model multiplies.
        """
        shape = batch, count
        if shape not in self._rotations:
            cos, sin = self
            half = cos.shape[-1] // 2
            table = torch.cat([cos[..., :half], sin[..., :half]], dim=-1).flatten(0, -2).float()
            row, places = torch.arange(table.shape[0], device=cos.device), cos.shape[:-1]
            if places[-2:] != shape:
                row = row.view(places).expand(*places[:-2], *shape)
            # One row of angles for all three axes, or one for each.
            self._rotations[shape] = (table, row.reshape(3 if len(places) == 3 else 1, -1).expand(3, -1))
        return self._rotations[shape]


class _Append:
    """Stands for cos, for sin and for the cache during one call of an attention's forward."""

    def __init__(self, kv_cache: Any, layer: Any, rotations: Rotations) -> None:
        self._cache, self._layer, self._rotations = kv_cache, layer, rotations
        self.query: Tensor | None = None
        self.sections: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, [B, heads, length, D]; rotates the remembered q in place."""
        query, self.query = self.query, None
        q = query.transpose(1, 2).contiguous()
        kv = append_rows_(
            self._layer, (q, key.transpose(1, 2), value.transpose(1, 2)), self._rotations.of(*q.shape[:2]),
            self.sections, {}, self._rotations.slots,
        )  # fmt: skip
        if q.data_ptr() != query.data_ptr():
            query.copy_(q.transpose(1, 2))
        return kv


def _remember(q: Tensor, k: Tensor, append: _Append, _: Any, sections: Any = None, *__: Any, **___: Any) -> tuple:
    """Takes the place of the function that rotates: q and k as they are, until the cache is updated."""
    append.query = q
    append.sections = (q.shape[-1] // 2, 0, 0) if sections is None else tuple(sections)
    return q, k


def _exchanged(original: Forward) -> Forward:
    """The attention's forward, calling `_remember` where it calls the function that rotates."""
    names = {**original.__globals__, **dict.fromkeys(ROTATIONS, _remember)}
    clone = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    clone.__kwdefaults__ = original.__kwdefaults__
    return clone


class _LegacyLayer:
    """A layer of the `DynamicCache` before transformers 4.56, two lists of tensors, with a `DynamicLayer`'s names."""

    def __init__(self, kv_cache: Any, index: int) -> None:
        self._cache, self._index = kv_cache, index

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
        return self.keys.shape[-2] if self.is_initialized else 0

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        self._cache.key_cache.append(keys)
        self._cache.value_cache.append(values)


def _layer(kv_cache: Any, index: int) -> Any:
    """The cache's layer that the kernel can append to, or the reason why there is none."""
    if kv_cache is None:
        return "no cache"
    if getattr(kv_cache, "offloading", False):
        return "the cache is offloaded"
    layers = getattr(kv_cache, "layers", None)
    if layers is None and hasattr(kv_cache, "key_cache") and type(kv_cache).__name__ == "DynamicCache":
        return _LegacyLayer(kv_cache, index)
    if layers is None:
        return f"a {type(kv_cache).__name__} has no layers"
    grows = getattr(kv_cache, "layer_class_to_replicate", None)
    if grows is not None and grows.__name__ in LAYERS:
        while len(layers) <= index:
            layers.append(grows())
    if len(layers) <= index:
        return f"the cache has {len(layers)} layers"
    name = type(layers[index]).__name__
    return layers[index] if name in LAYERS else f"{name} stores other rows"


def _reason(hidden: Tensor | None, given: dict[str, Any], name: str, index: int) -> Any:
    """The layer to append to, or the reason why this call takes the original way."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if hidden is None or name not in given or given.get("position_embeddings") is None:
        return f"hidden_states, {name} or position_embeddings is not given by name"
    if torch.is_autocast_enabled(hidden.device.type):
        return "autocast"
    layer = _layer(given[name], index)
    if isinstance(layer, str):
        return layer
    places, shape = given["position_embeddings"][0].shape[-3:-1], hidden.shape[:2]
    if places != shape and any(angles not in (1, tokens) for angles, tokens in zip(places, shape)):
        return "position_embeddings are of another batch or length"
    if layer.is_initialized and not layer.keys.dtype == layer.values.dtype == hidden.dtype:
        return f"the cache holds {layer.keys.dtype} and {layer.values.dtype}"
    return layer


def _make_attention(original: Forward, calls: Counter[str]) -> Forward:
    exchanged, name = _exchanged(original), _cache_name(original)

    def forward(self: nn.Module, *inputs: Any, **given: Any) -> Any:
        hidden = inputs[0] if inputs else given.get("hidden_states")
        layer = _reason(hidden, given, name, self.layer_idx)
        if isinstance(layer, str):
            calls[f"original: {layer}"] += 1
            return original(self, *inputs, **given)
        rotations = given["position_embeddings"]
        if not isinstance(rotations, Rotations):
            rotations = Rotations(rotations)
        kv_cache = given[name]
        append = given[name] = _Append(kv_cache, layer, rotations)
        given["position_embeddings"] = (append, append)
        output = exchanged(self, *inputs, **given)
        if append.query is not None:
            raise RuntimeError(
                f"{type(self).__name__}.forward rotated q and did not update the cache: layer {self.layer_idx} got "
                "nothing; report this version of transformers, and unpatch"
            )
        calls["append_visual_kv_"] += 1
        # Before transformers 5 an attention hands its cache on.
        if type(output) is tuple and any(part is append for part in output):
            output = tuple(kv_cache if part is append else part for part in output)
        return output

    return forward


def _make_rotary(original: Forward, calls: Counter[str]) -> Forward:
    def forward(self: nn.Module, *inputs: Any, **given: Any) -> Any:
        calls["table"] += 1
        return Rotations(original(self, *inputs, **given))

    return forward


def _cache_name(function: Forward) -> str | None:
    return next((name for name in CACHES if name in function.__code__.co_varnames), None)


def _refuse_attention(module: nn.Module) -> str | None:
    function = type(module).forward
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return "its forward is wrapped by a decorator"
    names, variables = function.__code__.co_names, function.__code__.co_varnames
    if not set(ROTATIONS) & set(names) or "update" not in names or "position_embeddings" not in variables:
        return f"its forward does not rotate with {' or '.join(ROTATIONS)} and update a cache"
    if _cache_name(function) is None:
        return f"its forward has no argument {' or '.join(CACHES)}"
    missing = lacks(module, "layer_idx", "head_dim", "q_proj", "k_proj", "v_proj")
    if missing:
        return missing
    if not isinstance(module.layer_idx, int):
        return f"its layer_idx is {module.layer_idx!r}; without a number it has no place in a cache"
    return f"its head_dim is {module.head_dim}, which is odd" if module.head_dim % 2 else None


RULES = (
    Rule(
        "append_visual_kv",
        (
            "Qwen2VLAttention",
            "Qwen2VLSdpaAttention",
            "Qwen2VLFlashAttention2",
            "Qwen2_5_VLAttention",
            "Qwen2_5_VLSdpaAttention",
            "Qwen2_5_VLFlashAttention2",
            "Qwen3VLTextAttention",
        ),
        _refuse_attention,
        _make_attention,
    ),
    Rule(
        "append_visual_kv",
        ("Qwen2VLRotaryEmbedding", "Qwen2_5_VLRotaryEmbedding", "Qwen3VLTextRotaryEmbedding"),
        lambda module: None,
        _make_rotary,
    ),
)
