"""Rotary embedding and cache update of a foreign attention through `append_visual_kv_`.

    # transformers' Qwen3VLTextAttention.forward, as it is | … and what its lines do when it is patched
    q, k, v = (p(x) for p in (q_proj, k_proj, v_proj))     | as before, in heads
    q = self.q_norm(q); k = self.k_norm(k)                 | return q and k as they are
    cos, sin = position_embeddings                         | one HeldQuery takes the places of cos and of sin
    q, k = apply_rotary_pos_emb(q, k, cos, sin)            | returns q and k as they are; the HeldQuery keeps q
    k, v = past_key_values.update(k, v, self.layer_idx)    | an AppendingCache: one kernel normalises and rotates q
                                                           | in place and writes k, as rotated, and v into the cache
    out = attention(q, k, v, mask)                         | sees the rotated q and all keys and values, as before
    return self.o_proj(out)                                | as before

The attention's own code runs, whatever its version: projections, masks and the attention itself. It is a copy of the
function that looks its names up where the original does, but for the one that rotates, and for norms of heads whose
weights say all that their calls would do. Other norms are called.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from vpt_kernels.caches import LAYERS, append_rows_
from vpt_kernels.guard import OwnForward, keeps_outputs, why_watched
from vpt_kernels.patch import legacy
from vpt_kernels.patch.angles import Angles, angles_of
from vpt_kernels.patch.functions import changed_copy, innermost
from vpt_kernels.patch.norms import NORMS, STAND_IN, as_it_is, head_norms, normalises
from vpt_kernels.patch.rules import Forward, Rule, Serve, lacks, record
from vpt_kernels.patch.supported import ATTENTIONS

ROTATIONS = ("apply_rotary_pos_emb", *legacy.ROTATIONS)
"""What an attention calls to rotate, with cos and sin [B, S, D] already mixed from three positions."""
CACHES = ("cache", "past_key_values", *legacy.CACHES)
"""Names of the argument that holds the cache, the newest first."""
LIBRARY = "transformers.cache_utils"


class HeldQuery:
    """Stands for cos and for sin in one call of an attention's forward, and keeps the q that they should rotate."""

    def __init__(self, kept: bool = False) -> None:
        self.query: Tensor | None = None
        self.sections: tuple[int, ...] | None = None
        self.kept = kept
        """Somebody may keep what they see of q before it is rotated: it is not rotated in place."""

    def take(self) -> Tensor:
        """Return the query, which is held for one update of the cache."""
        query, self.query = self.query, None
        if query is None:
            raise RuntimeError(
                "the cache is updated without a rotation before it; report this version of transformers, and unpatch"
            )
        return query


def hold(
    q: Tensor, k: Tensor, held: HeldQuery, _: Any, sections: Any = None, *__: Any, **___: Any
) -> tuple[Tensor, Tensor]:
    """Return q and k as they are, in the place of the function that rotates; the held q is rotated with the cache."""
    held.query = q = q.clone() if held.kept else q
    held.sections = None if sections is None else tuple(sections)
    return q, k


class AppendingCache:
    """Stands for the cache in one call of an attention's forward: the caller's, but for `update`."""

    def __init__(
        self, cache: Any, layer: Any, angles: Angles, held: HeldQuery, norms: dict[str, Any] | None = None
    ) -> None:
        self._cache, self._layer, self._angles, self._held, self._norms = cache, layer, angles, held, norms or {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values of the layer, [B, heads, length, D]; the held q is rotated in place."""
        held = self._held
        query = held.take()
        q = query.transpose(1, 2)
        if q.stride(-1) != 1 or (q.shape[0] > 1 and q.stride(0) != q.shape[1] * q.stride(1)):
            q = q.contiguous()
        behind = getattr(self._cache, "layers", [])[layer_idx + 1 :]
        qkv, rotation = (q, key.transpose(1, 2), value.transpose(1, 2)), self._angles.of(*q.shape[:2])
        sections = held.sections or self._angles.sections
        kv = append_rows_(self._layer, qkv, rotation, sections, self._norms, partial(self._angles.slots, behind))
        if q.data_ptr() != query.data_ptr():
            query.copy_(q.transpose(1, 2))
        return kv


def _why_rotated_elsewhere(function: FunctionType) -> str | None:
    """Return why the function that the attention calls to rotate is not the one beside it, or None."""
    for name in ROTATIONS:
        names = function.__globals__
        if name in function.__code__.co_names and not _is_own(names.get(name), names):
            return f"another library replaced {name}"
    return None


def _is_own(found: Any, names: dict[str, Any]) -> bool:
    """Return whether it is a function of the module with these globals, and so is each that it calls there."""
    if type(found) is FunctionType and found.__globals__ is names:
        for name in found.__code__.co_names:
            other = names.get(name, torch)
            if other is not torch and not _is_own(other, names):
                return False
        return True
    if not isinstance(found, nn.Module) or not type(found).__module__.startswith("kernels."):
        return False
    # The package `kernels` makes a module of a function, whose forward it can exchange.
    changed = "forward" in vars(found) or found._forward_hooks or found._forward_pre_hooks
    within = [cell.cell_contents for cell in type(found).forward.__closure__ or ()]
    return not changed and bool(within) and all(_is_own(function, names) for function in within)


def _own_update(holder: Any) -> bool:
    """Return whether `holder.update` is the library's own."""
    update = getattr(type(holder).update, "__globals__", {})
    return update.get("__name__") == LIBRARY and "update" not in vars(holder)


def _layer(cache: Any, index: int) -> Any:
    """Return the cache's layer that the kernel can append to; raises OwnForward where there is none."""
    if cache is None:
        raise OwnForward("no cache")
    if getattr(cache, "offloading", False):
        raise OwnForward("the cache is offloaded")
    layers = getattr(cache, "layers", None)
    if layers is None:
        return legacy.layer(cache, index)
    grows = getattr(cache, "layer_class_to_replicate", None)
    if grows is not None and grows.__name__ in LAYERS:
        while len(layers) <= index:
            layers.append(grows())
    if len(layers) <= index:
        raise OwnForward(f"the cache has {len(layers)} layers")
    name = type(layers[index]).__name__
    if name not in LAYERS:
        raise OwnForward(f"{name} stores other rows")
    if not _own_update(layers[index]) or not _own_update(cache):
        raise OwnForward(f"update of {type(cache).__name__} or {name} is not transformers'")
    return layers[index]


def _served(function: FunctionType, hidden: Tensor | None, given: dict[str, Any], name: str, index: int) -> Any:
    """Return the layer to append to; raises OwnForward for a call that the kernel does not serve."""
    # Hooks see what they saw: every module that the attention calls is still called.
    reason = why_watched() or _why_rotated_elsewhere(function)
    if reason is not None:
        raise OwnForward(reason)
    if torch.is_grad_enabled():
        raise OwnForward("gradients are enabled")
    if hidden is None or not name or given.get("position_embeddings") is None:
        raise OwnForward("hidden_states, the cache or position_embeddings is not given by name")
    if type(hidden) is not Tensor:
        raise OwnForward("its input is no plain tensor")
    if torch.is_autocast_enabled(hidden.device.type):
        raise OwnForward("autocast")
    layer = _layer(given[name], index)
    places, shape = given["position_embeddings"][0].shape[-3:-1], hidden.shape[:2]
    if places != shape and any(angles not in (1, tokens) for angles, tokens in zip(places, shape)):
        raise OwnForward("position_embeddings are of another batch or length")
    if layer.is_initialized and not layer.keys.dtype == layer.values.dtype == hidden.dtype:
        raise OwnForward(f"the cache holds {layer.keys.dtype} and {layer.values.dtype}")
    return layer


def _make(original: Forward) -> Serve:
    function, exchange = innermost(original), dict.fromkeys(ROTATIONS, hold)
    code, defaults = function.__code__, function.__defaults__
    with_norms, without = (changed_copy(original, exchange, dict.fromkeys(names, STAND_IN)) for names in ((), NORMS))
    fuses = normalises(function)

    def serve(module: Any, calls: Counter[str] | None, *inputs: Any, **given: Any) -> Any:
        if torch.compiler.is_compiling():
            raise OwnForward("torch.compile")
        hidden: Any = inputs[0] if inputs else given.get("hidden_states")
        name = next((name for name in CACHES if name in given), "")
        if function.__code__ is not code or function.__defaults__ is not defaults:
            # As a notebook's autoreload exchanges it within the function.
            raise OwnForward("its forward has other code than when it was patched")
        layer = _served(function, hidden, given, name, module.layer_idx)
        norms, own = head_norms(module, hidden) if fuses else ({}, None)
        makers = module.q_proj, module._modules.get("q_norm")
        held, cache = HeldQuery(any(map(keeps_outputs, filter(None, makers)))), given[name]
        cos, sin = given["position_embeddings"]
        angles = angles_of(cos, sin, module.layer_idx)
        append = AppendingCache(cache, layer, angles, held, norms)
        exchanged = without if norms else with_norms
        output = exchanged(module, *inputs, **given | {name: append, "position_embeddings": (held, held)})
        if held.query is not None:
            raise RuntimeError(
                f"{type(module).__name__}.forward rotated q and did not update the cache: layer {module.layer_idx} got "
                "nothing; report this version of transformers, and unpatch"
            )
        record(calls, "append_visual_kv_" if own is None else f"append_visual_kv_ behind its own norms: {own}")
        return legacy.handed_on(output, append, cache)

    return serve


def _refuse(module: Any) -> str | None:
    try:
        function = innermost(type(module).forward)
    except OwnForward as reason:
        return str(reason)
    code, home = function.__code__, function.__globals__.get("__name__")
    names, variables = code.co_names, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if home != type(module).__module__:
        return f"its forward was replaced by one of {home}"
    if not set(ROTATIONS) & set(names) or "update" not in names or "position_embeddings" not in variables:
        return f"its forward does not rotate with {' or '.join(ROTATIONS)} and update a cache"
    if not set(CACHES) & set(variables):
        return f"its forward has no argument {' or '.join(CACHES)}"
    missing = lacks(module, "layer_idx", "head_dim", "q_proj", "k_proj", "v_proj")
    if missing:
        return missing
    if not isinstance(module.layer_idx, int):
        return f"its layer_idx is {module.layer_idx!r}; without a number it has no place in a cache"
    return f"its head_dim is {module.head_dim}, which is odd" if module.head_dim % 2 else None


def _declines(module: nn.Module) -> str | None:
    return _why_rotated_elsewhere(innermost(type(module).forward))


RULES = (
    Rule(
        "append_visual_kv",
        ATTENTIONS,
        _refuse,
        _declines,
        _make,
        methods={STAND_IN: staticmethod(as_it_is)},
    ),
)
