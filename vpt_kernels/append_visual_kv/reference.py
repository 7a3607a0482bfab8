"""Plain PyTorch: gather cos/sin by three position rows, rotate halves, write rows of the caches."""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_kernels.library import implement


def _cos_sin(table: Tensor, positions: Tensor, sections: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin of every token, [T, 1, rotary_dim / 2]: channel block j takes position row j (chunked M-RoPE)."""
    if table.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= table.shape[0]:
            raise RuntimeError(
                f"positions span {low}..{high}; the cos_sin table has rows 0..{table.shape[0] - 1}: build a longer table"
            )
    rows = table[positions.long().clamp(0, table.shape[0] - 1)]  # [3, T, rotary_dim]
    halves = []
    for half in rows.chunk(2, dim=-1):
        parts = half.split(sections, dim=-1)
        halves.append(torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)[:, None])
    return halves[0], halves[1]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    half = cos.shape[-1]
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return rotated.to(x.dtype)


def _store(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    page_size = cache.shape[-3]
    capacity = page_size * (cache.shape[0] if cache.dim() == 4 else 1)
    valid = (slots >= 0) & (slots < capacity)
    slot = slots[valid].long()
    index = (slot // page_size, slot % page_size) if cache.dim() == 4 else (slot,)
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
) -> Tensor:
    cos, sin = _cos_sin(cos_sin, positions, (section_t, section_h, section_w))
    _store(k_cache, slots, _rotate(k, cos, sin))
    _store(v_cache, slots, v)
    return _rotate(q, cos, sin).contiguous()


def append_visual_kv_(q: Tensor, *others: object) -> None:
    q.copy_(append_visual_kv(q, *others))


implement("append_visual_kv", "reference", append_visual_kv)
implement("append_visual_kv_", "reference", append_visual_kv_)
