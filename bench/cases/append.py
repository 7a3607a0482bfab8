"""append_visual_kv against transformers, eager PyTorch, and the packages of serving stacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.cases import COMPILED, TOLERANCES, Alternative, Case, absent, compiled, require_close, sweep, workspace
from bench.rooflines import append_work
from bench.timers import Call
from bench.workloads import LMS, Append
from vpt_kernels import append_visual_kv, append_visual_kv_, rotary_table

SECTIONS, EPS = (16, 24, 24), 1e-6
# On a GPU buffers rotate until they exceed its L2 cache; a CPU call runs on warm inputs, as it does behind a GEMM.
ROTATION_BYTES = {"cpu": 0, "cuda": 128 << 20}


class Buffers:
    """One set of inputs and caches, and every implementation's call on it."""

    def __init__(self, workload: Append, device: str) -> None:
        self.workload, self.device = workload, device
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
        weights = (1 + 0.1 * torch.randn(lm.head_dim, device=device).to(dtype) for _ in range(2))
        self.norms = dict(zip(("q_norm", "k_norm"), weights)) if workload.normed else {}

    def ours(self) -> Tensor:
        rows = self.q, self.k, self.v, self.table, self.positions, self.slots
        return append_visual_kv(*rows, self.k_cache, self.v_cache, SECTIONS, **self.norms)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return the rows of both caches at our slots."""
        return tuple(c.view(-1, *t.shape[1:])[self.slots] for c, t in ((self.k_cache, self.k), (self.v_cache, self.v)))

    def forget(self) -> None:
        for cache in (self.k_cache, self.v_cache):
            cache.fill_(float("nan"))

    def in_place(self) -> None:
        append_visual_kv_(
            self.q, self.k, self.v, self.table, self.positions, self.slots, self.k_cache, self.v_cache, SECTIONS
        )

    def rotated_in_place(self) -> Tensor:
        """Return what `in_place` makes of q, which afterwards holds what it held."""
        before = self.q.clone()
        self.in_place()
        after = self.q.clone()
        self.q.copy_(before)
        return after

    def copy(self) -> None:
        for target, source in zip(self.copies, (self.q, self.k, self.v)):
            target.copy_(source)

    def eager(self) -> Tensor:
        return eager_append(*self.flat(), **self.norms)

    def flat(self) -> tuple[Tensor, ...]:
        """Return the arguments of `eager_append`."""
        caches = (cache.view(-1, *self.k.shape[1:]) for cache in (self.k_cache, self.v_cache))
        return self.q, self.k, self.v, self.cos, self.sin, self.slots, *caches


def eager_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """Write the rotated rows, normalised before as transformers does it, by index_copy_; cos and sin come mixed."""

    def rotate(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            wide = x.float()
            x = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        low, high = x.chunk(2, -1)
        return x * cos[0, :, None] + torch.cat([-high, low], -1) * sin[0, :, None]

    k_cache.index_copy_(0, slots, rotate(k, k_norm))
    v_cache.index_copy_(0, slots, v)
    return rotate(q, q_norm)


class TransformersAppend:
    """transformers' norms and rotation and its StaticCache of one layer, which keeps keys and values itself."""

    def __init__(self, buffers: Buffers) -> None:
        from transformers import Qwen2Config, StaticCache
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

        lm = buffers.lm
        self.norms = [nn.Identity(), nn.Identity()]
        for place, weight in enumerate(buffers.norms.values()):
            self.norms[place] = Qwen3VLTextRMSNorm(lm.head_dim, EPS)
            self.norms[place].weight = nn.Parameter(weight, requires_grad=False)
        config = Qwen2Config(
            num_hidden_layers=1,
            num_attention_heads=lm.heads,
            num_key_value_heads=lm.kv_heads,
            hidden_size=lm.heads * lm.head_dim,
        )
        self.buffers, self.rotate = buffers, apply_rotary_pos_emb
        self.static = StaticCache(config=config, max_cache_len=buffers.workload.capacity)

    def __call__(self) -> Tensor:
        q, k = (norm(t) for norm, t in zip(self.norms, (self.buffers.q, self.buffers.k)))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, self.buffers.v))
        rotated, keys = self.rotate(q, k, self.buffers.cos, self.buffers.sin)
        self.static.update(keys, v, 0)
        self.static.layers[0].cumulative_length.zero_()
        return rotated[0].transpose(0, 1)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values [tokens, heads, head_dim] that the last call appended."""
        layer, tokens = self.static.layers[0], self.buffers.workload.tokens
        return tuple(t[0, :, :tokens].transpose(0, 1) for t in (layer.keys, layer.values))


def _compiled(buffers: Buffers) -> Call:
    append = compiled(eager_append)
    return lambda: append(*buffers.flat(), **buffers.norms)


def _flashinfer(buffers: Buffers) -> Call:
    """Return the rotation by PyTorch, as FlashInfer has none for three position rows, then its paged append."""
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
    """Rotate by Liger's kernel, three position rows, then index_copy_ into the caches."""
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


def _contiguous(buffers: Buffers) -> str | None:
    return "knows no pages" if buffers.workload.page_size else absent("transformers")


def _plain_on_a_gpu(buffers: Buffers) -> str | None:
    if buffers.norms:
        return "has no norm of heads"
    return None if buffers.device == "cuda" else "needs a GPU"


def _paged_on_a_gpu(buffers: Buffers) -> str | None:
    return _plain_on_a_gpu(buffers) if buffers.workload.page_size else "appends to pages"


def _never(buffers: Buffers) -> str:
    return absent("flash_attn") or "attends in the same call, and rotates a token by one position, not three"


COPY = Alternative(
    "copy of the same bytes",
    "copy_ of q, k and v: as many bytes as the append reads and writes, and no arithmetic",
    lambda buffers: buffers.copy,
)
TRANSFORMERS = Alternative(
    "transformers rotary + StaticCache",
    "apply_rotary_pos_emb and StaticCache.update; position rows mixed before",
    TransformersAppend,
    _contiguous,
)
ALTERNATIVES = (
    COPY,
    Alternative(
        "eager index_copy_",
        "rotation by two products, index_copy_ into both caches; position rows mixed before",
        lambda buffers: buffers.eager,
    ),
    Alternative("torch.compile", COMPILED, _compiled),
    TRANSFORMERS,
    Alternative(
        "rotation + FlashInfer append",
        "eager rotation, flashinfer.append_paged_kv_cache",
        _flashinfer,
        _paged_on_a_gpu,
        peer="flashinfer",
    ),
    Alternative(
        "Liger M-RoPE + index_copy_",
        "liger_multimodal_rotary_pos_emb on contiguous copies, index_copy_",
        _liger,
        _plain_on_a_gpu,
        peer="liger_kernel",
    ),
    Alternative("flash_attn_with_kvcache", "flash-attn's append inside its attention", lambda buffers: None, _never),
)


def build(workload: Append, device: str) -> Case:
    work = append_work(workload)
    sets = [Buffers(workload, device) for _ in range(1 + ROTATION_BYTES[device] // work.bytes)][:64]
    first = sets[0]
    # All but the copy make a new q.
    alternatives = {one.name: one.calls(sets) for one in ((COPY,) if workload.in_place else ALTERNATIVES)}

    def check() -> None:
        tolerance = TOLERANCES[workload.dtype]
        expected, stored = first.eager(), first.stored()
        found = {"ours": [first.rotated_in_place if workload.in_place else first.ours], **alternatives}
        for name, calls in found.items():
            if isinstance(calls, str) or name == COPY.name:
                continue
            first.forget()
            require_close(f"append_visual_kv: {name}: q", calls[0](), expected, tolerance)
            appended = getattr(calls[0], "stored", first.stored)()
            for part, actual, right in zip("kv", appended, stored):
                require_close(f"append_visual_kv: {name}: {part} cache", actual, right, tolerance)

    ours = [s.in_place if workload.in_place else s.ours for s in sets]
    outputs = 0 if workload.in_place else first.q.numel() * first.q.element_size()
    return Case(
        workload.op,
        workload.shape,
        workload.dtype,
        device,
        ours,
        alternatives,
        check,
        work,
        workspace(ours[0], device, outputs),
        sweep=sweep(workload.op, workload),
    )
