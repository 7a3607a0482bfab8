"""append_visual_kv against transformers, eager PyTorch, and the packages of serving stacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import TOLERANCES, Case, absent, peer, require_close, sweep, workspace
from bench.rooflines import append_work
from bench.timers import Call
from bench.workloads import LMS, Append
from vpt_kernels import append_visual_kv, append_visual_kv_, rotary_table

SECTIONS = (16, 24, 24)
# On a GPU buffers rotate until they exceed its L2 cache; a CPU call runs on warm inputs, as it does behind a GEMM.
ROTATION_BYTES = {"cpu": 0, "cuda": 128 << 20}


class Buffers:
    """One set of inputs and caches, and every implementation's call on it."""

    def __init__(self, workload: Append, device: str) -> None:
        lm, dtype, tokens = LMS[workload.lm], getattr(torch, workload.dtype), workload.tokens
        widths = [lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim, lm.kv_heads * lm.head_dim]
        packed = torch.randn(tokens, sum(widths), device=device).to(dtype)
        self.lm, self.q, self.k, self.v = (
            lm,
            *(part.unflatten(1, (-1, lm.head_dim)) for part in packed.split(widths, 1)),
        )
        self.table = rotary_table(workload.capacity + 8, lm.head_dim, device=device)
        self.positions = (torch.arange(tokens).expand(3, -1) + torch.tensor([[0], [3], [7]])).to(device)
        self.slots = torch.arange(workload.capacity - tokens, workload.capacity, device=device)
        shape = (workload.capacity, lm.kv_heads, lm.head_dim)
        if workload.page_size:
            shape = (workload.capacity // workload.page_size, workload.page_size, *shape[1:])
        self.k_cache, self.v_cache = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.copies = [torch.empty_like(t) for t in (self.q, self.k, self.v)]
        # transformers mixes the three position rows once per forward call, not per layer: not counted here.
        halves = (half.split(SECTIONS, -1) for half in self.table[self.positions].chunk(2, -1))
        mixed = [torch.cat([part[axis] for axis, part in enumerate(parts)], -1) for parts in halves]
        self.cos, self.sin = (torch.cat([half, half], -1)[None].to(dtype) for half in mixed)

    def ours(self) -> Tensor:
        return append_visual_kv(
            self.q, self.k, self.v, self.table, self.positions, self.slots, self.k_cache, self.v_cache, SECTIONS
        )

    def stored(self) -> tuple[Tensor, Tensor]:
        """The rows of both caches at our slots."""
        return tuple(c.view(-1, *t.shape[1:])[self.slots] for c, t in ((self.k_cache, self.k), (self.v_cache, self.v)))

    def forget(self) -> None:
        for cache in (self.k_cache, self.v_cache):
            cache.fill_(float("nan"))

    def in_place(self) -> None:
        append_visual_kv_(
            self.q, self.k, self.v, self.table, self.positions, self.slots, self.k_cache, self.v_cache, SECTIONS
        )

    def rotated_in_place(self) -> Tensor:
        """What `in_place` makes of q, which afterwards holds what it held."""
        before = self.q.clone()
        self.in_place()
        after = self.q.clone()
        self.q.copy_(before)
        return after

    def copy(self) -> None:
        for target, source in zip(self.copies, (self.q, self.k, self.v)):
            target.copy_(source)

    def eager(self) -> Tensor:
        return eager_append(
            self.q, self.k, self.v, self.cos, self.sin, self.slots, self.k_cache.view(-1, *self.k.shape[1:]),
            self.v_cache.view(-1, *self.v.shape[1:]),
        )  # fmt: skip


def eager_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """index_copy_ of the rotated rows; cos and sin mixed beforehand."""

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[0, :, None] + torch.cat([-high, low], -1) * sin[0, :, None]

    k_cache.index_copy_(0, slots, rotate(k))
    v_cache.index_copy_(0, slots, v)
    return rotate(q)


Stored = Callable[[], tuple[Tensor, Tensor]]
"""What a call stored: keys and values [tokens, heads, head_dim]."""


def _transformers(buffers: Buffers, capacity: int) -> tuple[Call, Stored]:
    from transformers import Qwen2Config, StaticCache
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    lm = buffers.lm
    config = Qwen2Config(
        num_hidden_layers=1,
        num_attention_heads=lm.heads,
        num_key_value_heads=lm.kv_heads,
        hidden_size=lm.heads * lm.head_dim,
    )
    static = StaticCache(config=config, max_cache_len=capacity)

    def call() -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (buffers.q, buffers.k, buffers.v))
        rotated, keys = apply_rotary_pos_emb(q, k, buffers.cos, buffers.sin)
        static.update(keys, v, 0)
        static.layers[0].cumulative_length.zero_()
        return rotated[0].transpose(0, 1)

    def stored() -> tuple[Tensor, Tensor]:
        layer, tokens = static.layers[0], buffers.k.shape[0]
        return tuple(t[0, :, :tokens].transpose(0, 1) for t in (layer.keys, layer.values))

    return call, stored


def _flashinfer(buffers: Buffers) -> Call:
    """The rotation by PyTorch, as FlashInfer has none for three position rows, then its paged append."""
    import flashinfer

    tokens, page_size = buffers.k.shape[0], buffers.k_cache.shape[1]
    device = buffers.k.device
    integers = {"dtype": torch.int32, "device": device}
    pages = buffers.k_cache.shape[0]
    batch = torch.zeros(tokens, **integers)
    indices, indptr = torch.arange(pages, **integers), torch.tensor([0, pages], **integers)
    last = torch.tensor([page_size], **integers)
    cache = (buffers.k_cache, buffers.v_cache)

    def call() -> Tensor:
        def rotate(x: Tensor) -> Tensor:
            low, high = x.chunk(2, -1)
            return x * buffers.cos[0, :, None] + torch.cat([-high, low], -1) * buffers.sin[0, :, None]

        flashinfer.append_paged_kv_cache(
            rotate(buffers.k), buffers.v, batch, buffers.slots.int(), cache, indices, indptr, last
        )
        return rotate(buffers.q)

    return call


def _liger(buffers: Buffers) -> Call:
    """Liger's rotation by three position rows, then index_copy_ into the caches."""
    from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb

    rows = buffers.table[buffers.positions][:, None]  # [3, 1, tokens, rotary_dim]
    cos, sin = (torch.cat([half, half], -1).to(buffers.q.dtype) for half in rows.chunk(2, -1))
    caches = [cache.view(-1, *buffers.k.shape[1:]) for cache in (buffers.k_cache, buffers.v_cache)]

    def call() -> Tensor:
        # It rotates in place, and our inputs are used again.
        q, k = (t.transpose(0, 1)[None].contiguous() for t in (buffers.q, buffers.k))
        q, k = liger_multimodal_rotary_pos_emb(q, k, cos, sin, list(SECTIONS))
        caches[0].index_copy_(0, buffers.slots, k[0].transpose(0, 1))
        caches[1].index_copy_(0, buffers.slots, buffers.v)
        return q[0].transpose(0, 1)

    return call


def build(workload: Append, device: str) -> Case:
    work = append_work(workload)
    sets = [Buffers(workload, device) for _ in range(1 + ROTATION_BYTES[device] // work.bytes)][:64]
    first = sets[0]
    timed: dict[str, list[Call] | str] = {}
    elsewhere: dict[str, Stored] = {}
    if not workload.in_place:
        compiled = torch.compile(eager_append, fullgraph=True)

        def compile_of(s: Buffers) -> Call:
            flat = [cache.view(-1, *s.k.shape[1:]) for cache in (s.k_cache, s.v_cache)]
            return lambda: compiled(s.q, s.k, s.v, s.cos, s.sin, s.slots, *flat)

        timed["eager index_copy_"] = [s.eager for s in sets]
        timed["torch.compile"] = [compile_of(s) for s in sets]
        if not workload.page_size:
            name, missing = "transformers rotary + StaticCache", absent("transformers")
            if missing:
                timed[name] = missing
            else:
                pairs = [_transformers(s, workload.capacity) for s in sets]
                timed[name], elsewhere[name] = [call for call, _ in pairs], pairs[0][1]
        unusable = None if device == "cuda" else "needs a GPU"
        if workload.page_size:
            timed["rotation + FlashInfer append"] = peer("flashinfer", _flashinfer, sets, unusable=unusable)
        timed["Liger M-RoPE + index_copy_"] = peer("liger_kernel", _liger, sets, unusable=unusable)
        timed["flash_attn_with_kvcache"] = absent("flash_attn") or (
            "attends in the same call, and turns a token by one position, not three"
        )

    def check() -> None:
        tolerance = TOLERANCES[workload.dtype]
        expected, stored = first.eager(), first.stored()
        own = {"ours": [first.rotated_in_place if workload.in_place else first.ours]}
        for name, calls in (own | timed).items():
            if isinstance(calls, str):
                continue
            first.forget()
            require_close(f"append_visual_kv: {name}: q", calls[0](), expected, tolerance)
            for part, found, right in zip("kv", elsewhere.get(name, first.stored)(), stored):
                require_close(f"append_visual_kv: {name}: {part} cache", found, right, tolerance)

    ours = [s.in_place if workload.in_place else s.ours for s in sets]
    outputs = 0 if workload.in_place else first.q.numel() * first.q.element_size()
    op = "append_visual_kv_" if workload.in_place else "append_visual_kv"
    return Case(
        op, workload.shape, workload.dtype, device, ours, {"copy of the same bytes": [s.copy for s in sets]} | timed,
        check, work, workspace(ours[0], device, outputs), sweep=sweep(op, workload),
    )  # fmt: skip
