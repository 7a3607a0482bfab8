"""Angles of the rotary embedding, and slots of a cache, that the layers of one forward call share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from vpt_kernels.caches import page_slots


class Angles:
    """What the layers of one forward call of the model derive from its cos and sin, computed once."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        half = cos.shape[-1] // 2
        self.stamp = _stamp(cos, sin)
        self.layer = -1
        """The one that asked last."""
        self.sections = (half, 0, 0)
        """One position row: where the model mixes those of three axes, it has done so."""
        self._places = cos.shape[:-1]
        self._table = torch.cat([cos[..., :half], sin[..., :half]], dim=-1).flatten(0, -2).float()
        self._slots: dict[tuple[Any, ...], Tensor] = {}
        self._ahead: dict[int, tuple[Any, ...]] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}

    def slots(self, behind: Sequence[Any], batch: int, start: int | Tensor, *place: Any) -> Tensor:
        """Return `page_slots` for one layer of a cache; compute them at the same time for those behind it.

        A length on the host is the same in every layer. Lengths on a device may differ, and to ask would be to wait:
        the first layer computes the slots of all, and each takes its own once, if its length is what it was.
        """
        key = (batch, start, *place)
        if not isinstance(start, Tensor):
            if key not in self._slots:
                self._slots[key] = page_slots(*key)
            return self._slots[key]
        count, page, device = place
        length, *facts, slots = self._ahead.pop(id(start), (None, None))
        if length is start and facts == [_stamp(start), batch, *place]:
            return slots
        alike = [start, *(layer.cumulative_length for layer in behind if _static(layer, page, device))]
        rows = page_slots(batch, torch.stack(alike)[:, None], *place)
        # Aligned as a tensor of its own, for which kernels are compiled.
        rows = nn.functional.pad(rows, (0, -rows.shape[1] % 2))[:, : batch * count]
        self._ahead = {id(own): (own, _stamp(own), batch, *place, row) for own, row in zip(alike, rows)}
        return self._ahead.pop(id(start))[-1]

    def is_over(self, cos: Tensor, sin: Tensor, layer: int) -> bool:
        """Return whether the tensors have changed, or may have, before this layer asks."""
        if self.stamp != _stamp(cos, sin):
            return True
        return layer <= self.layer and (cos.is_inference() or sin.is_inference())

    def of(self, batch: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the kernel's table, one row per angle, and the positions [3, batch · count] that read it.

        A batch or a number of tokens of one is that of every row or token, as where the model multiplies.
        """
        shape, places = (batch, count), self._places
        if shape not in self._rows:
            row = torch.arange(self._table.shape[0], device=self._table.device)
            if places[-2:] != shape:
                row = row.view(places).expand(*places[:-2], *shape)
            # One row of angles for all three axes, or one for each.
            self._rows[shape] = row.reshape(3 if len(places) == 3 else 1, -1).expand(3, -1)
        return self._table, self._rows[shape]


def _static(layer: Any, page: int, device: torch.device) -> bool:
    """Return whether a layer of a cache counts its tokens on this device and has pages of this size."""
    ready = type(layer).__name__ == "StaticLayer" and layer.is_initialized
    return ready and layer.max_cache_len == page and layer.cumulative_length.device == device


_angles: dict[int, tuple[ref[Tensor], ref[Tensor], Angles]] = {}


def _stamp(*tensors: Tensor) -> tuple[int, ...]:
    """Return what tells that none was changed in place; inference tensors cannot say it."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def angles_of(cos: Tensor, sin: Tensor, layer: int) -> Angles:
    """Return the angles of this very pair of tensors, remembered as long as cos lives.

    layer: the number of the one that asks. Inference tensors do not say that they have changed: there the angles are
    those of one forward call, which asks for its layers in turn.
    """
    key = id(cos)
    known = _angles.get(key)
    if known is None or known[0]() is not cos or known[1]() is not sin or known[2].is_over(cos, sin, layer):
        known = _angles[key] = (ref(cos, lambda _: _angles.pop(key, None)), ref(sin), Angles(cos, sin))
    known[2].layer = layer
    return known[2]
