"""int4 weights: integers from 0 to 15, with a scale and a minimum for 32 columns of a row; eight of them an int32."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
"""Columns that share a scale and a minimum; `kGroup` in csrc/cpu/packed_linear.h."""
COLUMNS = 8
"""Columns in one int32."""
_SMALLEST = 2.0**-24  # of float16 above zero


def quantise(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the words of float32 rows [n, K], int32 [n, ⌈K/8⌉], and float16 scales and minima, [n, 2·⌈K/64⌉] each.

    scale = (max w − min w) / 15 over a group, minimum = min w, both rounded to float16 before the integer nearest to
    (w − minimum) / scale is taken. Behind the last column they are zero.
    """
    columns = rows.shape[1]
    groups = -(-columns // GROUP)
    # The last column again is neither a new minimum nor a new maximum.
    whole = torch.cat([rows, rows[:, -1:].expand(-1, -columns % GROUP)], 1).unflatten(1, (groups, GROUP))
    low = whole.amin(-1) if columns else rows.new_zeros(len(rows), 0)
    high = whole.amax(-1) if columns else low
    scales, minima = ((high - low) / 15).half(), low.half()
    if not scales.is_meta and not bool((torch.isfinite(scales) & torch.isfinite(minima)).all()):
        raise ValueError(
            "weight has a NaN, an infinity or a number beyond ±65504, which int4 cannot hold: scales and minima are "
            "float16; keep it in a float dtype"
        )
    steps = scales.float().clamp_min(_SMALLEST)[..., None]
    integers = ((whole - minima.float()[..., None]) / steps).round_().clamp_(0, 15).flatten(1)
    integers[:, columns:] = 0
    words = integers[:, : -(-columns // COLUMNS) * COLUMNS].int().unflatten(1, (-1, COLUMNS))
    packed = (words << _shifts(rows.device)).sum(-1, dtype=torch.int32)
    scales, minima = (torch.nn.functional.pad(numbers, (0, groups % 2)) for numbers in (scales, minima))
    return packed, scales, minima


def dequantise(words: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Return scale·integer + minimum, float32 [..., 8·W], of words [..., W] and scales and minima [..., groups].

    Rounded once: the product is exact.
    """
    integers = (words[..., None] >> _shifts(words.device) & 15).flatten(-2).float()
    spread = (numbers.float().repeat_interleave(GROUP, -1)[..., : integers.shape[-1]] for numbers in (scales, minima))
    return integers * next(spread) + next(spread)


def _shifts(device: torch.device) -> Tensor:
    """Return the first bit of each column in a word: of a pair the first in the low half, the other in the high one."""
    return torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device=device)
