"""Plain PyTorch: normalise heads, gather cos/sin by three position rows, rotate halves, write rows of the caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpt_kernels.library import implement

FLOAT8_MAX = 448.0


def _axes(sections: tuple[int, int, int], interleaved: bool) -> list[int]:
    """Return which position row rotates each half-dimension."""
    if not interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes = [0] * sum(sections)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = [axis] * len(range(axis, min(3 * sections[axis], len(axes)), 3))
    return axes


def _cos_sin(table: Tensor, positions: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Return the cos and sin of every token, [T, 1, rotary_dim / 2]."""
    if table.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"positions span {low}..{high}; the cos_sin table has rows 0..{table.shape[0] - 1}: "
                "build a longer table"
            )
    rows = table[positions.long().clamp(0, table.shape[0] - 1)]  # [3, T, rotary_dim]
    axis = torch.tensor(axes, device=table.device)
    cos, sin = (half.gather(0, axis.expand(1, rows.shape[1], -1))[0][:, None] for half in rows.chunk(2, dim=-1))
    return cos, sin


def _normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return transformers' RMSNorm of every head: the quotient in float32 (float64 for float64), rounded, times the
    weight.
    """
    if weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rotated x, computed in float32 (float64 for float64) and rounded to `dtype`; the rest of each row as it
    is.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    half = cos.shape[-1]
    first, second = wide[..., :half], wide[..., half : 2 * half]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(dtype), x[..., 2 * half :].to(dtype)], dim=-1)


def _store(cache: Tensor, slots: Tensor, rows: Tensor, heads_first: bool, scale: Tensor | None) -> None:
    if scale is not None:
        # PyTorch before 2.13 converts what is too large for float8 to NaN: saturate first.
        rows = (rows.float() / scale.reshape(-1, 1)).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    rows = rows.to(cache.dtype)
    if heads_first:
        cache = cache.transpose(-2, -3)
    page_size = cache.shape[-3]
    capacity = page_size * (cache.shape[0] if cache.dim() == 4 else 1)
    valid = (slots >= 0) & (slots < capacity)
    slot = slots[valid].long()
    index = (slot // page_size, slot % page_size) if cache.dim() == 4 else (slot,)
    if cache.dtype == torch.float8_e4m3fn:  # which index_put_ does not know
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache.index_put_(index, rows[valid])


def append_visual_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    section_t: int,
    section_h: int,
    section_w: int,
    interleaved: bool,
    heads_first: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> Tensor:
    cos, sin = _cos_sin(cos_sin, positions, _axes((section_t, section_h, section_w), interleaved))
    rounded = k.dtype if k_scale is None else torch.float32
    _store(k_cache, slots, _rotate(_normalise(k, k_norm, norm_eps), cos, sin, rounded), heads_first, k_scale)
    _store(v_cache, slots, v, heads_first, v_scale)
    return _rotate(_normalise(q, q_norm, norm_eps), cos, sin, q.dtype)


def append_visual_kv_(q: Tensor, *others: Any) -> None:
    q.copy_(append_visual_kv(q, *others))


implement("append_visual_kv", "reference", append_visual_kv)
implement("append_visual_kv_", "reference", append_visual_kv_)
