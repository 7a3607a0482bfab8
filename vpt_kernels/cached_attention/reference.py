"""Plain PyTorch: all scores at once, in float32 or, of float64 inputs, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_kernels.library import implement


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if torch.float64 in (q.dtype, keys.dtype) else torch.float32
    (tokens, heads, dim), (stored, kv_heads, _) = q.shape, keys.shape
    rows = q.to(wide).unflatten(1, (kv_heads, heads // kv_heads))  # [T, Hkv, group, D]
    scores = torch.einsum("thgd,lhd->thgl", rows * dim**-0.5, keys.to(wide))
    if causal:
        unseen = torch.ones(tokens, stored, dtype=torch.bool, device=q.device).triu_(stored - tokens + 1)
        scores = scores.masked_fill(unseen[:, None, None], float("-inf"))
    log_sum = scores.logsumexp(-1)
    # Without keys the sum's logarithm is −∞, and nothing is mixed.
    mixed = torch.einsum("thgl,lhd->thgd", (scores - log_sum[..., None]).exp(), values.to(wide))
    return mixed.flatten(1, 2).to(q.dtype).contiguous(), log_sum.flatten(1).float().contiguous()


implement("cached_attention", "reference", cached_attention)
