"""Causal attention of new tokens over cached ones, aligned by what is cached: new token i sees past + i + 1 keys.

Outside CUDA graphs (`Ragged`) the host knows every length and SDPA gets views of the cache that end where it ends.
Inside (`Padded`) only the device knows them, and `attend` reads nothing behind the last key. flash-attn takes both
where it is installed. On a GPU none of this has run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_kernels import append_visual_kv_, cached_attention
from vpt_model.network import decode
from vpt_model.network.cache import KVCache
from vpt_model.network.capture import uploaded

FEW = 16
"""New tokens up to which attention on a CPU is a matter of how often keys are read."""


@dataclass(frozen=True)
class Rotary:
    """What M-RoPE needs: `table` from `rotary_table`, and how many half-dimensions each axis rotates."""

    table: Tensor
    sections: tuple[int, int, int]


@dataclass(frozen=True)
class _Segment:
    """The tokens of one conversation in a forward call, and what its attention needs in every layer."""

    cache: KVCache
    begin: int
    end: int
    slots: Tensor
    positions: Tensor
    mask: Tensor | None


class Ragged:
    """Attends for several conversations' new tokens, one after the other, `lengths[i]` behind `caches[i]`.

    positions: [3, T] on the caches' device. Raises ValueError if a cache cannot take its tokens, before any is written.
    """

    def __init__(
        self, caches: Sequence[KVCache], lengths: Sequence[int], positions: Tensor, rotary: Rotary, dtype: torch.dtype
    ) -> None:
        self.rotary, self.segments, begin = rotary, [], 0
        for one, count in zip(caches, lengths, strict=True):
            end = begin + count
            if count:
                # Of a cache in several parts, each part gets a mask of its own.
                mask = None if one.shared else causal_mask(count, one.length, dtype, positions.device)
                self.segments.append(_Segment(one, begin, end, one.slots(count), positions[:, begin:end], mask))
            begin = end

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q [T, Hq, D] in place, append rotated k and v [T, Hkv, D] to the caches of `layer`: [T, Hq · D]."""
        attended = []
        for s in self.segments:
            keys, values = s.cache.keys[layer], s.cache.values[layer]
            query = q[s.begin : s.end]
            self._append(s, query, k[s.begin : s.end], v[s.begin : s.end], keys, values)
            stored = s.cache.length - s.cache.floor + s.end - s.begin
            if s.cache.shared:
                parts = [(rows.keys[layer], rows.values[layer]) for rows in s.cache.shared]
                attended.append(attend_parts(query, [*parts, (keys[:stored], values[:stored])]))
            elif _reads_each_key_once(query, keys):
                attended.append(cached_attention(query, keys[:stored], values[:stored])[0].flatten(1))
            elif use_flash(q):
                attended.append(_flash(query[None], keys[None], values[None], stored)[0].flatten(1))
            else:
                attended.append(_sdpa(query, keys[:stored], values[:stored], s.mask))
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _append(self, s: _Segment, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        """Rotate q and store rotated k and v behind what `keys` and `values` hold, rounded where those are narrower."""
        table, sections = self.rotary.table, self.rotary.sections
        if keys.dtype == k.dtype:
            append_visual_kv_(q, k, v, table, s.positions, s.slots, keys, values, sections=sections)
            return
        rotated, stored = k.new_empty(k.shape), v.new_empty(v.shape)
        in_turn = torch.arange(len(k), device=k.device)
        append_visual_kv_(q, k, v, table, s.positions, in_turn, rotated, stored, sections=sections)
        for cached, rows in ((keys, rotated), (values, stored)):
            cached.index_copy_(0, s.slots, rows.to(cached.dtype))


class Padded:
    """Attends for R conversations' new tokens, N rows each, the first of which may be padding; nothing is read back.

    keys, values: [layers, slots, Hkv, D], shared by all conversations, `capacity` slots each. positions: [3, R · N].
    slots: [R · N], −1 for padding, which is neither stored nor seen. lengths: starts, past and counts of `attend`.
    tickets: int32 zeros, one per channel and one per token and head, by which a launch's programs know who is last.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        capacity: int,
        positions: Tensor,
        slots: Tensor,
        lengths: tuple[Tensor, Tensor, Tensor],
        rotary: Rotary,
        tickets: Tensor | None = None,
    ) -> None:
        self.keys, self.values, self.capacity = keys, values, capacity
        self.positions, self.slots, self.lengths, self.rotary = positions, slots, lengths, rotary
        self.tickets = tickets

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        append_visual_kv_(
            q, k, v, self.rotary.table, self.positions, self.slots, keys, values, sections=self.rotary.sections
        )
        rows = q.unflatten(0, (len(self.lengths[0]), -1))
        return attend(rows, keys, values, *self.lengths, self.capacity, self.tickets).flatten(0, 1)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    past: Tensor,
    counts: Tensor,
    capacity: int,
    tickets: Tensor | None = None,
) -> Tensor:
    """Return attention of padded queries over caches in one buffer; no value is read by the host.

    q: [R, N, Hq, D], of which the last `counts[r]` tokens of row r are real. keys, values: [slots, Hkv, D] with the new
    tokens' already in place; row r's are `capacity` slots from `starts[r]` on, past[r] + counts[r] of them used.
    starts, past, counts: int32 [R]. The first real token of row r sees past[r] + 1 keys, each further one another, the
    last all that are used; nothing behind them reaches it, not even NaN. Padding stands in front so that its rows are
    aligned as flash-attn's are. tickets: as of `Padded`. Returns [R, N, Hq · D], 0 for padding.
    """
    if use_flash(q):
        cached_keys, cached_values = (x.unflatten(0, (-1, capacity)) for x in (keys, values))
        return _flash(q, cached_keys, cached_values, past + counts, starts // capacity).flatten(2)
    if not decode.on_gpu(q):
        return _composed(q, keys, values, starts, past, counts, capacity)
    from vpt_model.network import attention_triton

    return attention_triton.attend(q, keys, values, starts, past, counts, capacity, tickets)


Within = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Full attention of the patches [N, heads, D] of several images, within each: [N, heads · D]."""


def within(x: Tensor, lengths: Sequence[int], head_dim: int) -> Within:
    """Return attention within images of `lengths` patches, for a tower whose patches are like x; it is made once for
    all blocks.
    """
    if takes_ragged(x, head_dim):
        ends = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
        return partial(_ragged, ends=uploaded(ends, x.device), longest=max(lengths))
    return partial(_image_by_image, lengths=lengths)


def within_padded(x: Tensor, ends: Tensor, head_dim: int) -> Within:
    """Return attention within images that are followed by padding; the host reads nothing.

    x: [N, E], the patches. ends: int32 [images + 2], 0, the end of each image, an end twice where there is none, and N.
    What stands in the rows of padding is finite, if padding is, and without meaning.
    """
    if takes_ragged(x, head_dim):
        return partial(_ragged, ends=ends, longest=len(x))  # padding is an image of its own
    place = torch.arange(len(x), dtype=torch.int32, device=x.device)
    image = torch.searchsorted(ends[1:-1], place, right=True, out_int32=True)
    bias = torch.zeros(len(x), len(x), dtype=x.dtype, device=x.device)
    bias = bias.masked_fill_(image[:, None] != image, float("-inf"))
    return partial(_masked, bias=bias[None, None])


def takes_ragged(x: Tensor, head_dim: int) -> bool:
    """Return whether flash attention over several sequences takes tensors like x: 16 bits, from sm_80 on."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _ragged(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Attend with flash-attn where it is installed, else with PyTorch's same kernel, which also fills what dropout
    would need.
    """
    if flash := _flash_attn():
        return flash.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest
        ).flatten(1)
    from torch.nn.attention.varlen import varlen_attn

    attended: Any = varlen_attn(q, k, v, ends, ends, longest, longest)
    return attended.flatten(1)


def _image_by_image(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    images = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    attended = [
        F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in image))[0].transpose(0, 1)
        for image in images
    ]
    return (attended[0] if len(attended) == 1 else torch.cat(attended)).flatten(1)


def _masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[0].transpose(0, 1).flatten(1)


def attend_parts(q: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return attention of new tokens q [T, Hq, D] over keys and values that lie in several places, as if they were one.

    parts: keys and values [L_i, Hkv, D] in the order of their tokens; the last T keys are the new tokens' own. Each
    part is read where it is, and the parts' results are merged by their log-sum-exp. Returns [T, Hq · D].
    """
    backend = "auto" if q.device.type == "cpu" else "reference"
    found = [cached_attention(q, *part, causal=part is parts[-1], backend=backend) for part in parts]
    sums = torch.stack([log_sum for _, log_sum in found])
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = (sums - sums.logsumexp(0)).exp()[..., None].to(wide)
    return sum(weight * mixed.to(wide) for weight, (mixed, _) in zip(weights, found)).to(q.dtype).flatten(1)


def _reads_each_key_once(q: Tensor, keys: Tensor) -> bool:
    """Return whether `cached_attention` takes new tokens: few on a CPU, or over a cache of another dtype."""
    return q.device.type == "cpu" and (keys.dtype != q.dtype or len(q) <= FEW)


def causal_mask(count: int, past: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the additive mask [count, past + count] aligned at its lower right, or None where SDPA needs none."""
    if count == 1 or past == 0:
        return None
    return torch.full((count, past + count), float("-inf"), dtype=dtype, device=device).triu_(past + 1)


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return grouped-query attention of q [T, Hq, D] over cache views [L, Hkv, D]: [T, Hq · D]."""
    count, heads, dim = q.shape
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    if count == 1:
        # One token sees every key: its query heads become the rows of their KV head, which reads each key once.
        rows = q.view(1, keys.shape[1], -1, dim)
        return F.scaled_dot_product_attention(rows, keys, values).reshape(1, heads * dim)
    # SDPA aligns is_causal at the upper left, which is right for a first chunk only.
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(count, heads * dim)


def _composed(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, past: Tensor, counts: Tensor, capacity: int
) -> Tensor:
    """Do `attend` with PyTorch's operations over whole rows of the cache: on a CPU, where the buckets are tested, and
    on a GPU without Triton.
    """
    conversations, tokens, heads, dim = q.shape
    slot = torch.arange(capacity, device=q.device)
    token = torch.arange(tokens, device=q.device) - (tokens - counts)[:, None]  # [R, N], negative for padding
    used = (slot < (past + counts)[:, None])[:, :, None, None]  # [R, C, 1, 1]
    # A weight of 0 does not silence NaN: what is not used has to be removed.
    row = (starts[:, None] + slot).flatten()
    k, v = (
        torch.where(used, x.index_select(0, row).unflatten(0, (-1, capacity)), 0).float() for x in (keys, values)
    )  # [R, C, Hkv, D]
    visible = slot <= (past[:, None] + token.clamp_min(0))[..., None]  # [R, N, C]
    rows = q.float().unflatten(2, (keys.shape[1], -1))  # [R, N, Hkv, group, D]
    scores = torch.einsum("rnhgd,rchd->rhgnc", rows, k) * dim**-0.5
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    out = torch.einsum("rhgnc,rchd->rnhgd", weights, v).flatten(2)
    return torch.where((token >= 0)[..., None], out, 0).to(q.dtype)


@cache
def _flash_attn() -> Any:
    """Return flash-attn 2, or None where it is not installed."""
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn if hasattr(flash_attn, "flash_attn_with_kvcache") else None


def use_flash(x: Tensor) -> bool:
    """Return whether flash-attn takes tensors like x."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and _flash_attn() is not None


def _flash(q: Tensor, keys: Tensor, values: Tensor, stored: Tensor | int, rows: Tensor | None = None) -> Tensor:
    """Attend with flash-attn over a cache [rows, capacity, Hkv, D]; its causal mask is aligned at the lower right, as
    ours is.
    """
    return _flash_attn().flash_attn_with_kvcache(
        q, keys, values, cache_seqlens=stored, cache_batch_idx=rows, causal=True
    )
