"""`append_visual_kv_` on other stacks' caches: vLLM's and FlashInfer's pages, transformers' cache layers.

Nothing here moves a key: each function says where the tokens go and calls the one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from vpt_kernels.append_visual_kv.api import LAYOUTS, append_visual_kv_
from vpt_kernels.checks import CHECK_VALUES, require_choice, require_integer, require_tensor, require_type, shown

LAYERS = ("StaticLayer", "DynamicLayer")
"""Classes of transformers' cache layers that `append_to_layer_` knows; sliding and quantised ones keep other rows."""

MIN_SPARE = 16
"""Rows that a dynamic layer's buffers have beyond its tokens when they are made; long ones have an eighth more."""


def append_to_vllm_pages_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    slot_mapping: Tensor,
    sections: tuple[int, int, int] = (16, 24, 24),
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Rotate q in place and append k and v to vLLM's pages: block `slot // block_size`, row `slot % block_size`.

    Args:
        q, k, v, cos_sin, positions, sections, interleaved, k_scale, v_scale, backend: as of `append_visual_kv_`.
        kv_cache: [2, blocks, block_size, kv heads, head_dim], or the pair of its halves; updated in place.
        slot_mapping: int32 or int64 [≤ T]; −1 marks padding, whose k and v are not stored. Where it is shorter, the
            rows of q, k, v and positions behind it are padding of a captured graph: they are left alone.

    Raises:
        ValueError: kv_cache is not a pair of caches; else as `append_visual_kv_`.

    Source: vLLM's `reshape_and_cache_flash`.
    """
    require_type("kv_cache", kv_cache, (Tensor, tuple, list), "one tensor, or a pair of them")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, None, None, 3)
    if isinstance(kv_cache, Tensor):
        require_tensor("kv_cache", kv_cache, None, None, 5)
    if len(kv_cache) != 2:
        raise ValueError(f"kv_cache holds {len(kv_cache)} tensors; it must hold two, the keys' and the values' pages")
    k_cache, v_cache = kv_cache
    require_tensor("slot_mapping", slot_mapping, None, None, 1)
    require_tensor("positions", positions, None, None, 2)
    count = slot_mapping.shape[0]
    append_visual_kv_(
        q[:count],
        k[:count],
        v[:count],
        cos_sin,
        positions[:, :count],
        slot_mapping,
        k_cache,
        v_cache,
        sections,
        interleaved=interleaved,
        k_scale=k_scale,
        v_scale=v_scale,
        backend=backend,
    )


def flashinfer_slots(
    append_indptr: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    page_size: int,
    tokens: int,
) -> Tensor:
    """Return where FlashInfer's page table stores the last tokens of each request: slots, int64 [tokens].

    Computed on the tensors' device without synchronisation.

    Args:
        append_indptr: int32 or int64 [requests + 1]; request i appends tokens append_indptr[i]…append_indptr[i + 1].
        kv_indices: pages of all requests, one after the other.
        kv_indptr: [requests + 1]; the pages of request i are kv_indices[kv_indptr[i]…kv_indptr[i + 1]].
        kv_last_page_len: [requests], rows in use of each last page, *after* the append.
        page_size: rows of a page. tokens: append_indptr[−1], which is on the device.

    Returns:
        Slots: page · page_size + row. Tokens beyond append_indptr[−1], those of a request that has fewer rows than
        new tokens, and those whose page lies outside kv_indices have slot −1: nothing is stored for them.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, page_size < 1.

    Source: FlashInfer's `append_paged_kv_cache` and `get_batch_indices_positions`.
    """
    named = {"append_indptr": append_indptr, "kv_indices": kv_indices}
    named |= {"kv_indptr": kv_indptr, "kv_last_page_len": kv_last_page_len}
    require_tensor("append_indptr", append_indptr, None, None, 1)
    for name, tensor in named.items():
        require_tensor(name, tensor, None, append_indptr.device, 1)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {tensor.dtype}; it must be int32 or int64")
    requests = kv_last_page_len.shape[0]
    if append_indptr.shape[0] != requests + 1 or kv_indptr.shape[0] != requests + 1:
        raise ValueError(
            f"append_indptr {tuple(append_indptr.shape)} and kv_indptr {tuple(kv_indptr.shape)} must be "
            f"({requests + 1},): one more than the {requests} entries of kv_last_page_len"
        )
    page_size = require_integer("page_size", page_size, 1, (1 << 31) - 1)
    tokens = require_integer("tokens", tokens, 0, (1 << 31) - 1)
    if not requests or not kv_indices.shape[0]:
        return torch.full((tokens,), -1, dtype=torch.int64, device=append_indptr.device)
    token = torch.arange(tokens, device=append_indptr.device)
    request = torch.searchsorted(append_indptr[1:].contiguous(), token, right=True)
    padding = request >= requests
    request = request.clamp(max=requests - 1)
    pages = kv_indptr[1:] - kv_indptr[:-1]
    length = (pages - 1) * page_size + kv_last_page_len
    row = length[request] - append_indptr[1:][request] + token
    padding |= (row < 0) | (row >= pages[request] * page_size)
    place = kv_indptr[request] + row.clamp(min=0) // page_size
    padding |= (place < 0) | (place >= kv_indices.shape[0])
    page = kv_indices[place.clamp(0, kv_indices.shape[0] - 1)]
    return torch.where(padding, -1, page.long() * page_size + row % page_size)


def append_to_flashinfer_pages_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    append_indptr: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    sections: tuple[int, int, int] = (16, 24, 24),
    *,
    kv_layout: str = "NHD",
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Rotate q in place and append k and v to FlashInfer's pages.

    Args:
        q, k, v, cos_sin, positions, sections, interleaved, k_scale, v_scale, backend: as of `append_visual_kv_`.
        paged_kv_cache: the pair (keys, values), each [pages, page_size, kv heads, head_dim] ("NHD") or
            [pages, kv heads, page_size, head_dim] ("HND"); or one tensor with a dimension of 2 behind the pages.
        append_indptr, kv_indices, kv_indptr, kv_last_page_len: see `flashinfer_slots`.

    Raises:
        TypeError, ValueError: as `flashinfer_slots` and `append_visual_kv_`.
    """
    require_choice("kv_layout", kv_layout, LAYOUTS)
    require_type("paged_kv_cache", paged_kv_cache, (Tensor, tuple, list), "one tensor, or a pair of them")
    require_tensor("q", q, None, None, 3)
    if isinstance(paged_kv_cache, Tensor):
        require_tensor("paged_kv_cache", paged_kv_cache, None, None, 5)
    for part in () if isinstance(paged_kv_cache, Tensor) else paged_kv_cache:
        require_tensor("a part of paged_kv_cache", part, None, None, None)
    pair = paged_kv_cache.unbind(1) if isinstance(paged_kv_cache, Tensor) else tuple(paged_kv_cache)
    if len(pair) != 2 or pair[0].dim() != 4:
        raise ValueError(
            "paged_kv_cache must be a pair of [pages, …] tensors of 4 dimensions, or one [pages, 2, …] tensor of 5; "
            f"it has {len(pair)} parts of {pair[0].dim() if pair else 0} dimensions"
        )
    page_size = pair[0].shape[1 if kv_layout == "NHD" else 2]
    slots = flashinfer_slots(append_indptr, kv_indices, kv_indptr, kv_last_page_len, page_size, q.shape[0])
    append_visual_kv_(
        q,
        k,
        v,
        cos_sin,
        positions,
        slots,
        *pair,
        sections,
        interleaved=interleaved,
        layout=kv_layout,
        k_scale=k_scale,
        v_scale=v_scale,
        backend=backend,
    )


def append_to_layer_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    layer: Any,
    sections: tuple[int, int, int] = (16, 24, 24),
    *,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate q in place and append k and v to one layer of transformers' `StaticCache` or `DynamicCache`.

    Takes the place of a model's rotary embedding and `layer.update(k, v)`, and leaves the layer as `update` would.

    Args:
        q: [batch, tokens, query heads, head_dim]; k, v: [batch, tokens, kv heads, head_dim]. Views are fine: q's
            last dimension must be contiguous, and its batch and tokens must merge into one dimension.
        cos_sin, sections, interleaved, backend: as of `append_visual_kv_`.
        positions: int32 or int64 [3, batch · tokens].
        layer: `cache.layers[i]`, a `StaticLayer` or `DynamicLayer`.

    Returns:
        All keys and values of the layer, [batch, kv heads, length, head_dim], as `layer.update` returns them: a static
        layer's buffers, or a dynamic layer's keys so far, views of buffers with room for the next tokens, so that
        not every token copies the cache. Rows that the layer gave out before are never written again.

    Raises:
        TypeError: another class of layer, which stores other rows, or wrong dtypes: also one that the layer has not.
        ValueError: the tokens do not fit a static layer (on a GPU, where the length is not known without a
            synchronisation, they are dropped instead), wrong shapes, a batch, heads or a device that the layer has
            not, or a q that is no view of [batch · tokens, …]. The layer is what it was after an error.
    """
    kind = type(layer).__name__
    if kind not in LAYERS:
        raise TypeError(f"layer is a {kind}; it must be one of {LAYERS}, whose row i is token i")
    require_tensor("q", q, None, None, 4)
    require_tensor("k", k, q.dtype, q.device, 4)
    require_tensor("v", v, q.dtype, q.device, 4)
    options = {"interleaved": interleaved, "backend": backend}
    return append_rows_(layer, (q, k, v), (cos_sin, positions), sections, options, page_slots)


def page_slots(batch: int, start: int | Tensor, count: int, page: int, device: torch.device) -> Tensor:
    """Return slots of tokens start…start + count of every row of a batch whose row b is page b, int64 [batch · count].

    Starts of several caches, a tensor [n, 1], give [n, batch · count].
    """
    if isinstance(start, int):
        token = torch.arange(start, start + count, device=device)
        if batch == 1:
            return token
    else:
        token = torch.arange(count, device=device) + start
        # A token that does not fit must not reach the next page.
        token = torch.where(token < page, token, -batch * page)
    return (torch.arange(0, batch * page, page, device=device)[:, None] + token.unsqueeze(-2)).flatten(-2)


def append_rows_(
    layer: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    sections: Any,
    options: dict[str, Any],
    slots_of: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Do `append_to_layer_` with checked arguments. slots_of: `page_slots`, or what remembers it for other layers."""
    q, k, v = qkv
    batch, count = k.shape[:2]
    if q.shape[:2] != k.shape[:2] or v.shape != k.shape or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [batch, tokens, heads, head_dim] "
            "with equal batch, tokens and head_dim, and k like v"
        )
    try:
        rows = (q.view(-1, *q.shape[2:]), k.flatten(0, 1), v.flatten(0, 1))
    except RuntimeError:
        raise ValueError(
            f"q has strides {q.stride()} at shape {tuple(q.shape)}: batch and tokens do not merge into one dimension, "
            "in which q is rotated in place; pass q.contiguous()"
        ) from None
    static = type(layer).__name__ == "StaticLayer"
    before = {} if layer.is_initialized else dict(vars(layer))
    try:
        start: Any = _check_capacity(layer, k, v) if static else layer.get_seq_length()
        _require_fitting(layer, k, start)
        keys, values = (layer.keys, layer.values) if static else _reserve(layer, k, v, start)
        slots = slots_of(batch, start, count, keys.shape[2], k.device)
        append_visual_kv_(*rows, *rotation, slots, keys, values, sections, layout="HND", **options)
    except Exception:
        # A static layer takes the shape of its first tokens, even of those that it then refuses.
        vars(layer).update(before)
        raise
    if static:
        layer.cumulative_length.add_(count)
        return keys, values
    if not layer.is_initialized:
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    layer.keys, layer.values = keys[:, :, : start + count], values[:, :, : start + count]
    _keep_spare(layer, keys, values)
    return layer.keys, layer.values


def _check_capacity(layer: Any, k: Tensor, v: Tensor) -> int | Tensor:
    """Return the length of a static layer that has room for k and v and, from its first tokens on, its buffers."""
    length, count = layer.cumulative_length, k.shape[1]
    if length.device.type == "cpu" or CHECK_VALUES:
        length = int(length)
        if length + count > layer.max_cache_len:
            raise ValueError(
                f"the static layer holds {length} of {layer.max_cache_len} tokens; {count} more do not fit: make the "
                f"cache with max_cache_len ≥ {length + count}"
            )
    if not layer.is_initialized:
        layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
    return length


def _require_fitting(layer: Any, k: Tensor, length: int | Tensor) -> None:
    """Raise unless k [batch, tokens, heads, head_dim] can follow what the layer holds."""
    if isinstance(length, int) and not length and type(layer).__name__ != "StaticLayer":
        return
    held, (batch, _, heads, head_dim) = layer.keys, k.shape
    if held.shape[0] != batch:
        raise ValueError(f"the layer holds a batch of {held.shape[0]}, the tokens are of a batch of {batch}")
    if (held.shape[1], held.shape[3]) != (heads, head_dim):
        raise ValueError(
            f"the layer holds {held.shape[1]} heads of {held.shape[3]}, the tokens have {heads} of {head_dim}"
        )
    if held.dtype != k.dtype:
        raise TypeError(f"k is {k.dtype}; it must be {held.dtype}, as the layer's keys")
    if held.device != k.device:
        raise ValueError(f"k is on {k.device}, the layer on {held.device}; move them to one device")


_spare: WeakKeyDictionary[Any, tuple[ref[Tensor], ref[Tensor], Tensor, Tensor]] = WeakKeyDictionary()
"""What a dynamic layer was given last, and the longer buffers behind it."""


def _keep_spare(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Remember the buffers as long as the layer holds what it was given of them: afterwards they are nobody's."""
    owner = ref(layer)

    def forget(dead: ref[Tensor]) -> None:
        known = _spare.get(owner()) if owner() is not None else None
        if known is not None and known[0] is dead:
            del _spare[owner()]

    _spare[layer] = (ref(layer.keys, forget), ref(layer.values), keys, values)


def cache_spare_bytes(cache: Any) -> int:
    """Return bytes that the tensors of a transformers cache keep in memory beyond the keys and values that they show.

    `append_to_layer_`, and with it `patch`, leaves a dynamic layer room for max(16, an eighth of its tokens) more
    tokens, so that not every token copies the cache; static layers have none. `compact_cache_` gives it back.

    Args:
        cache: a cache of transformers, old ones with lists of keys and values included.
    """
    return sum(t.untyped_storage().nbytes() - t.numel() * t.element_size() for _, _, t in _held(cache))


def compact_cache_(cache: Any) -> int:
    """Make the keys and values of a dynamic cache contiguous tensors without spare room, as `update` leaves them.

    For what asks more of a tensor than its values: `view`, `safetensors`, files that hold what is shown and no more.
    The next append makes room again.

    Args:
        cache: a cache of transformers; layers of static caches are left alone.

    Returns:
        The bytes that were given back.
    """
    before = cache_spare_bytes(cache)
    for place, key, tensor in _held(cache):
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            copy = tensor.clone(memory_format=torch.contiguous_format)
            if isinstance(key, int):
                place[key] = copy
            else:
                setattr(place, key, copy)
    return before - cache_spare_bytes(cache)


def _held(cache: Any) -> list[tuple[Any, Any, Tensor]]:
    """Return where a cache holds its growing tensors (layer and attribute, or list and index), and the tensors."""
    if hasattr(cache, "layers"):
        grown = [layer for layer in cache.layers if type(layer).__name__ == "DynamicLayer" and layer.is_initialized]
        return [(layer, name, getattr(layer, name)) for layer in grown for name in ("keys", "values")]
    if not hasattr(cache, "key_cache"):
        raise TypeError(f"cache is {shown(cache)}; it must be a cache of transformers, such as DynamicCache")
    lists = [getattr(cache, name, ()) for name in ("key_cache", "value_cache")]
    return [(part, index, tensor) for part in lists for index, tensor in enumerate(part)]


def _reserve(layer: Any, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values [batch, heads, ≥ length + tokens, head_dim] that begin with the layer's.

    Rows that anyone has seen are never written again: the rows behind `length` are free only if the layer still holds
    the very tensors that it was given by the last append; what was cropped, reordered or shared is copied.
    """
    batch, count, heads, head_dim = k.shape
    known = _spare.get(layer) if length else None
    if known is not None and known[0]() is layer.keys and known[1]() is layer.values:
        # A tensor made in inference mode must not be changed outside of it.
        usable = torch.is_inference_mode_enabled() or not known[2].is_inference()
        if usable and known[2].shape[2] >= length + count:
            return known[2:]
    spare = max(MIN_SPARE, length // 8) if type(layer).__name__ == "DynamicLayer" else 0
    room = length + count + spare
    whole = (k.new_empty((batch, heads, room, head_dim)), v.new_empty((batch, heads, room, head_dim)))
    for part, held in zip(whole, (layer.keys, layer.values)):
        if length:
            part[:, :, :length] = held
        # A file made of it must not hold what was in the memory before.
        part[:, :, length + count :] = 0
    return whole
