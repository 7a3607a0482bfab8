"""Images as vLLM's multimodal items: uint8 pixels and a grid; no pixel is resized outside the workers.

All fields stay on the CPU: vLLM strips others from items that it has cached, and a worker that must encode such an item
again after a preemption would not get its pixels back.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

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
FEATURES = "features_name"
"""Fields of the two modalities. control: the slot, and whether there is an image besides the state itself.
features_name: int64 [2]; where it is equal, so are the features before any control state."""


def _item(**fields: Tensor) -> MultiModalKwargsItem:
    place = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem({name: MultiModalFieldElem(data=data, field=place) for name, data in fields.items()})


def _features(name: str) -> Tensor:
    return torch.frombuffer(bytearray(blake2b(name.encode(), digest_size=16).digest()), dtype=torch.int64)


def image_item(pixels: Tensor, grid: tuple[int, int]) -> MultiModalKwargsItem:
    """Return an image or a crop as an item. pixels: uint8 [height, width, 3]. grid: (rows, columns) in patches."""
    return _item(**{PIXELS: pixels, GRID: torch.tensor([1, *grid])})


def named(image: MultiModalFeatureSpec) -> MultiModalFeatureSpec:
    """Return an image whose item says by which name its features are found again.

    The item is a new one, since vLLM's cache shares items among requests.
    """
    fields = {**image.data, **_item(**{FEATURES: _features(image.identifier)})}
    return replace(image, data=MultiModalKwargsItem(fields))


def feature(shown: Shown) -> MultiModalFeatureSpec:
    """Return what a conversation shows as a feature of its request."""
    where = PlaceholderRange(offset=shown.start, length=shown.length)
    if shown.slot is None:
        item = image_item(shown.pixels, shown.grid)
        return named(MultiModalFeatureSpec(item, IMAGE, shown.name, where, mm_hash=shown.name))
    control = torch.tensor([shown.slot, int(shown.length > 1)])
    item = _item(**{AGAIN: shown.pixels, CONTROL: control, FEATURES: _features(shown.picture)})
    mask = torch.zeros(shown.length, dtype=torch.bool)
    mask[0] = mask[shown.first :] = True
    return MultiModalFeatureSpec(item, REENCODED, shown.name, replace(where, is_embed=mask), mm_hash=shown.name)
