"""The launches of the decode layer with PyTorch's operations, in any dtype: what the kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm in float32 (float64 for float64), rounded to x's dtype before its weight as in Qwen2-VL."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """Do `vpt_model.network.decode.norm_linear.norm_linear`."""
    return linear(rms_norm(x, norm, eps), weight, bias)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """Do `vpt_model.network.decode.norm_swiglu.norm_swiglu`."""
    gate, up = linear(rms_norm(x, norm, eps), weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Do `vpt_model.network.decode.linear_add.linear_add`."""
    return residual + linear(x, weight)


def head(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Do `vpt_model.network.decode.head.head`; logits are at least float32."""
    logits = linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, greedy(logits)


def greedy(logits: Tensor) -> Tensor:
    """Return the argmax of logits [..., vocab], the lowest id on ties, −1 where a logit is NaN: int64 [...].

    Computed where the logits are, without a wait.
    """
    top, token = logits.max(dim=-1)
    return torch.where(top.isnan(), -1, token)


def attend(
    qkv: Tensor,
    table: Tensor,
    sections: tuple[int, int, int],
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    past: Tensor,
    counts: Tensor,
    capacity: int,
) -> Tensor:
    """Do `vpt_model.network.decode.attention.attend`, one conversation and head after the other; the host reads all."""
    (_, kv_heads, dim), out = keys.shape, torch.zeros_like(qkv[:, : qkv.shape[1] - 2 * keys[0].numel()])
    group = out.shape[1] // dim // kv_heads
    axis = [axis for axis, count in enumerate(sections) for _ in range(count)]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    for row, (start, length, count, slot) in enumerate(zip(*(x.tolist() for x in (starts, past, counts, slots)))):
        if not count:
            continue
        length = min(length, capacity - 1)
        angle = positions[axis, row].long().clamp(0, len(table) - 1)
        half = torch.arange(dim // 2, device=table.device)
        cos, sin = table[angle, half].to(wide), table[angle, dim // 2 + half].to(wide)
        heads = qkv[row].unflatten(0, (-1, dim))
        first, second = heads.to(wide).chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qkv.dtype)
        q, k, v = rotated[: group * kv_heads], rotated[group * kv_heads : -kv_heads], heads[-kv_heads:]
        if 0 <= slot < len(keys):
            keys[slot], values[slot] = k, v
        for head in range(group * kv_heads):
            own = head // group
            k_all, v_all = (
                torch.cat([cache[start : start + length, own], new[own : own + 1]])
                for cache, new in ((keys, k), (values, v))
            )
            weights = (k_all.to(wide) @ q[head].to(wide) * dim**-0.5).softmax(0)
            out[row, head * dim : (head + 1) * dim] = (weights.to(qkv.dtype) @ v_all).to(qkv.dtype)
    return out
