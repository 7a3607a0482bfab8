"""The vision tower and the re-encoders as CUDA graphs: eager, their host time exceeds the GPU's.

A tower's patches are padded to a bucket; padding stands behind the images and nothing real sees it. A re-encoder always
has the same shape. Padding is tested on the CPU, without graphs; capture and replay have not run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vpt_model.network.attention import within_padded
from vpt_model.network.capture import on_device, record
from vpt_model.network.encoders import DinoEncoder, SamEncoder
from vpt_model.network.model import Model
from vpt_model.network.positions import vision_positions
from vpt_model.network.vision import VisionTower

PATCHES = (64, 128, 256, 384, 512, 768, 1024, 1296)
"""Of the images of one replay; 1296 is the largest of 512 pixels a side."""
IMAGES = 8
"""Images of one replay at most."""


class _Replayed:
    """What runs over the same buffers every time; eager until it is captured."""

    graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple[Tensor, ...] = ()

    def run(self) -> tuple[Tensor]:
        raise NotImplementedError

    def result(self) -> Tensor:
        """Return the output for what now lies in the buffers, in memory of its own."""
        output = self.replay()
        return output if self.graph is None else output.clone()

    def replay(self) -> Tensor:
        """Return the output where the next replay may write to it again."""
        if self.graph is None:
            return self.run()[0]
        self.graph.replay()
        return self.outputs[0]

    def capture(self, pool: object, stream: torch.cuda.Stream | None = None) -> None:
        self.graph, self.outputs = record(self.run, pool, stream)


class PatchStep(_Replayed):
    """The tower on a few images of at most `patches` patches together.

    given: [L, H], to whose rows the features are also written: the first one is nobody's.
    """

    def __init__(self, tower: VisionTower, patches: int, given: Tensor | None = None) -> None:
        self.tower, self.given, config = tower, given, tower.config
        self.merged = config.spatial_merge_size**2
        self.x = torch.zeros(patches, config.embed_dim, dtype=tower.dtype, device=tower.device)
        self.order = torch.arange(patches, dtype=torch.int32, device=tower.device)
        # Ends of the images, of padding and, behind the last image, of none; rows and columns; rows of `given`.
        self.parts = [IMAGES + 2, 2 * patches, patches // self.merged]
        self.block = torch.zeros(sum(self.parts), dtype=torch.int32, device=tower.device)
        self.block[IMAGES + 1] = patches

    def __call__(self, patch_embeds: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map the patch embeddings [n, E] of the images to features [n / 4, H]."""
        with on_device(self.x):
            self.upload(patch_embeds, grids)
            return self.result()[: len(patch_embeds) // self.merged]

    def upload(self, patch_embeds: Tensor, grids: Sequence[tuple[int, int]], targets: Tensor | None = None) -> None:
        """Take the images' patches, and where they are, to the device; nobody waits for the copies.

        targets: int32 on the host, rows of `given` of the images' features.
        """
        block = torch.zeros(self.block.shape, dtype=torch.int32, device="cpu")
        ends, places, rows = block.split(self.parts)
        count, ends[-1] = len(patch_embeds), len(self.x)
        ends[1:-1] = count
        ends[1 : len(grids) + 1] = torch.tensor([height * width for height, width in grids], device="cpu").cumsum(0)
        places.view(-1, 2)[:count] = vision_positions(grids, self.tower.config.spatial_merge_size)
        if targets is not None:
            rows[: len(targets)] = targets
        self.x[:count] = patch_embeds
        self.block.copy_(block.pin_memory() if self.block.is_cuda else block, non_blocking=True)

    def run(self) -> tuple[Tensor]:
        ends, places, rows = self.block.split(self.parts)
        # Padding is masked, but what is masked must still be finite.
        x = torch.where((self.order < ends[-2])[:, None], self.x, 0)
        attend = within_padded(x, ends, self.tower.config.head_dim)
        features = self.tower.run(x, *self.tower.angles(places.view(-1, 2)), attend)
        if self.given is not None:
            self.given.index_copy_(0, rows.long(), features)
        return (features,)


class CapturedTower(VisionTower):
    """A tower, sharing its weights, that runs in steps; images that fit none together run one by one, or without.

    given: as of `PatchStep`.
    """

    def __init__(self, tower: VisionTower, buckets: Sequence[int] = PATCHES, given: Tensor | None = None) -> None:
        vars(self).update(vars(tower))
        self.steps = {patches: PatchStep(tower, patches, given) for patches in sorted(buckets)}

    def step(self, grids: Sequence[tuple[int, int]]) -> PatchStep | None:
        """Return the smallest step that takes these images together, or None."""
        count = sum(height * width for height, width in grids)
        if not 0 < len(grids) <= IMAGES:
            return None
        return next((step for patches, step in self.steps.items() if patches >= count), None)

    def forward(self, patch_embeds: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        counts = [height * width for height, width in grids]
        if sum(counts) != len(patch_embeds) or max(counts, default=0) > max(self.steps):
            return super().forward(patch_embeds, grids)
        if step := self.step(grids):
            return step(patch_embeds, grids)
        images = zip(patch_embeds.split(counts), grids, strict=True)
        return torch.cat([self.forward(image, [grid]) for image, grid in images])


class CapturedEncoder(_Replayed):
    """A re-encoder of one image; several conversations, on several streams, take turns."""

    def __init__(self, encoder: DinoEncoder | SamEncoder) -> None:
        device = encoder.device
        self.free = torch.cuda.Event() if device.type == "cuda" else None
        self.encoder, self.tokens, self.grid, self.policy = encoder, encoder.tokens, encoder.grid, encoder.policy
        self.embed_regions = encoder.embed_regions
        self.patches = torch.zeros(encoder.grid[0] * encoder.grid[1], encoder.width, dtype=encoder.dtype, device=device)

    def __call__(self, patch_embeds: Tensor) -> Tensor:
        if len(patch_embeds) != len(self.patches):
            return self.encoder(patch_embeds)
        # The streams meant are those of the buffers' device, whichever is current.
        with on_device(self.patches):
            if self.free is not None:
                torch.cuda.current_stream().wait_event(self.free)
            self.patches.copy_(patch_embeds)
            features = self.result()
            if self.free is not None:
                self.free.record()
            return features

    def run(self) -> tuple[Tensor]:
        return (self.encoder(self.patches),)


def captured(model: Model, given: Tensor | None = None) -> tuple[Model, dict[str, float]]:
    """Return the model with its towers captured, on its GPU, and the seconds of each capture.

    given: as of `PatchStep`.
    """
    tower, seconds = CapturedTower(model.vision, given=given), dict[str, float]()
    encoder: Any = model.encoder
    steps: dict[str, _Replayed] = {f"{patches} patches": step for patches, step in reversed(tower.steps.items())}
    pools, streams = dict.fromkeys(steps, torch.cuda.graph_pool_handle()), {}
    if encoder is not None:
        encoder = steps["re-encoder"] = CapturedEncoder(encoder)
        # It may run beside the others: then it must share neither their memory nor, by their stream, a workspace.
        pools["re-encoder"], streams["re-encoder"] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    for name, step in steps.items():
        begin = time.perf_counter()
        step.capture(pools[name], streams.get(name))
        torch.cuda.current_stream().synchronize()
        seconds[name] = time.perf_counter() - begin
    return replace(model, vision=tower, encoder=encoder), seconds
