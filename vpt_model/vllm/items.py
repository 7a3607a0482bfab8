"""Images as vLLM's multimodal items: uint8 pixels and a grid; no pixel is resized outside the workers.

All fields stay on the CPU: vLLM strips others from items that it has cached, and a worker that must encode such an item
again after a preemption would not get its pixels back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vpt_model.vllm.conversation import Shown

IMAGE, REENCODED = "image", "reencoded"
"""Modalities: an image or a crop of one, at image positions; and the image under a control state, at text positions."""
PIXELS, GRID = "pixels", "image_grid_thw"
AGAIN, CONTROL = "reencode_pixels", "control"
"""Fields of the two modalities. control: the slot, and whether there is an image besides the state itself."""


def _item(**fields: Tensor) -> MultiModalKwargsItem:
    place = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem({name: MultiModalFieldElem(data=data, field=place) for name, data in fields.items()})


def image_item(pixels: Tensor, grid: tuple[int, int]) -> MultiModalKwargsItem:
    """Return an image or a crop as an item. pixels: uint8 [height, width, 3]. grid: (rows, columns) in patches."""
    return _item(**{PIXELS: pixels, GRID: torch.tensor([1, *grid])})


def feature(shown: Shown) -> MultiModalFeatureSpec:
    """Return what a conversation shows as a feature of its request."""
    mask = None
    if shown.slot is None:
        modality, item = IMAGE, image_item(shown.pixels, shown.grid)
    else:
        modality = REENCODED
        item = _item(**{AGAIN: shown.pixels, CONTROL: torch.tensor([shown.slot, int(shown.length > 1)])})
        mask = torch.zeros(shown.length, dtype=torch.bool)
        mask[0] = mask[shown.first :] = True
    where = PlaceholderRange(offset=shown.start, length=shown.length, is_embed=mask)
    return MultiModalFeatureSpec(item, modality, shown.name, where, mm_hash=shown.name)
