"""The two ways to look again: see a region at full resolution, or re-encode the image under a control state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_kernels import (
    ControlProjector,
    RegionPlan,
    RegionPolicy,
    control_cross_attention,
    control_cross_attention_into,
)
from vpt_model.engine.events import Box, Clock
from vpt_model.network.encoders import DinoEncoder, SamEncoder
from vpt_model.network.model import Model
from vpt_model.network.vision import VisionTower


def plan(vision: VisionTower, image: Tensor, boxes: Sequence[Box], policy: RegionPolicy, clock: Clock) -> RegionPlan:
    """Return how each box of an image is cropped and resized; nothing but the image's size is read. Stage:
    "crop+embed".

    Raises ValueError for a box that is empty or outside the image.
    """
    with clock("crop+embed"):
        return vision.plan([image], [(0, *box) for box in boxes], policy)


def look(model: Model, image: Tensor, regions: RegionPlan, clock: Clock) -> tuple[Tensor, ...]:
    """Return the features [n_i, H] of each region of a decoded image.

    image: uint8 [height, width, 3] on the model's device. regions: from `plan`. Stages: "crop+embed", "ViT".
    """
    grids = regions.grids
    with clock("crop+embed", images=len(grids)):
        patches = model.vision.embed_plan([image], regions)
    tokens = [height * width // model.vision.config.spatial_merge_size**2 for height, width in grids]
    with clock("ViT", images=len(grids), vit_patches=len(patches), vit_calls=1):
        return model.vision.forward(patches, grids).split(tokens)


def upload(image: Tensor, device: torch.device) -> Tensor:
    """Return the image on the model's device, in memory of its own; to a GPU from pinned memory, without waiting for
    the copy.

    A camera's buffer may be written again while the question is being answered.
    """
    if device.type == "cuda" and image.device.type == "cpu":
        return image.pin_memory().to(device, non_blocking=True)
    return image.to(device, copy=True)


class Ahead:
    """What `reencode` will return, begun on a stream of its own beside the first round; not yet run on a GPU.

    It is wasted where the model never asks for it: dropping this object gives its memory back when it is no longer in
    use.
    """

    def __init__(self, model: Model, image: Tensor) -> None:
        self.stream = torch.cuda.Stream(image.device)
        self.stream.wait_stream(torch.cuda.current_stream(image.device))
        with torch.cuda.stream(self.stream):
            self.features = _encoder(model)(whole(model, image))
        # Freed on another stream, the image's memory could be given out again while it is still read here.
        image.record_stream(self.stream)

    def __call__(self) -> Tensor:
        """Return the features, for work on the current stream, which waits for them."""
        current = torch.cuda.current_stream(self.features.device)
        current.wait_stream(self.stream)
        self.features.record_stream(current)
        return self.features


def reencode(
    model: Model, image: Tensor | None, features: Tensor, clock: Clock, ahead: Callable[[], Tensor] | None = None
) -> Tensor:
    """Return the image as the projector reads it: [N, H] ("clip"), [1, N, D] (DINOv2) or [1, C, h, w] (SAM).

    image: uint8 [height, width, 3] on the model's device. features: [N, H], its first look; the "clip" re-encoder is
    the vision tower itself on the same image, so what it would compute is already there. ahead: an `Ahead`, where one
    was begun. Stages of the others: "crop+embed", "ViT"; what was begun before is only waited for, in "ViT".
    """
    if model.encoder is None:
        return features
    if ahead is not None:
        with clock("ViT", images=1, vit_calls=1):
            return ahead()
    assert image is not None, "a look at pixels that were dropped is refused before"
    with clock("crop+embed", images=1):
        patches = whole(model, image)
    with clock("ViT", images=1, vit_patches=len(patches), vit_calls=1):
        return model.encoder(patches)


def _encoder(model: Model) -> DinoEncoder | SamEncoder:
    assert model.encoder is not None, "the clip re-encoder is the vision tower"
    return model.encoder


def _projector(model: Model) -> ControlProjector:
    assert model.projector is not None, "a model without a projector has no action tokens"
    return model.projector


def whole(model: Model, image: Tensor) -> Tensor:
    """Return the patch embeddings of all of an image as the re-encoder reads them."""
    height, width, _ = image.shape
    return _encoder(model).embed_regions([image], [(0, 0, 0, width, height)])


def reencode_into(model: Model, features: Tensor, control: Tensor, embeds: Tensor, row: int, count: int) -> None:
    """Write the re-encoded image, conditioned by the control state, to `embeds[row : row + count]`.

    features: from `reencode`. control: [1, H]. embeds: [L, H]. Raises ValueError if the features do not make `count`
    tokens.
    """
    rows = torch.arange(row, row + count, device=embeds.device)
    control_cross_attention_into(features, control, _projector(model), embeds, rows)


def conditioning(model: Model, features: Tensor, control: Tensor) -> Tensor:
    """Return how strongly the control state changes each re-encoded token: a = f·k of `f + a·k`, float32 [tokens].

    features, control: as in `reencode_into`, which computes the same a on its way. Source: vpt_kernels'
    control_cross_attention/README.md.
    """
    projector = _projector(model)
    size, norm = (projector.hidden_size,), (projector.condition_norm_weight, projector.condition_norm_bias)
    key = F.linear(F.layer_norm(control, size, *norm), projector.condition_weight, projector.condition_bias)
    unconditioned = control_cross_attention(features, None, projector)
    return unconditioned.float() @ key[0].float()


def rehearse(model: Model, policy: RegionPolicy) -> None:
    """Run crop, embedding, towers and projector once, on no picture: nothing is then compiled inside a first look."""
    image = torch.zeros(64, 64, 3, dtype=torch.uint8, device=model.device)
    (features,), _ = model.vision.look([image], [(0, 0, 0, 64, 64)], policy)
    if model.projector is None:
        return
    if model.encoder is not None:
        features = model.encoder(whole(model, image))
    count = len(features) if model.encoder is None else model.encoder.tokens
    embeds = torch.zeros(count, model.config.hidden_size, dtype=model.dtype, device=model.device)
    reencode_into(model, features, torch.zeros_like(embeds[:1]), embeds, 0, count)
