"""The vision tower and the re-encoders as CUDA graphs: eager, their host time exceeds the GPU's.

A tower's patches are padded to a bucket, image by image; padding stands behind and nothing real sees it. A re-encoder
always has the same shape. Padding is tested on the CPU, without graphs; capture and replay have not run on a GPU yet.
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
from vpt_model.network.vision import VisionTower

PATCHES = (64, 128, 256, 384, 512, 768, 1024, 1296)
"""Per image; 1296 is the largest of 512 pixels a side."""


class _Replayed:
    """What runs over the same buffers every time; eager until it is captured."""

    graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple[Tensor, ...] = ()

    def run(self) -> tuple[Tensor]:
        raise NotImplementedError

    def result(self) -> Tensor:
        """Return the output for what now lies in the buffers, in memory of its own."""
        if self.graph is None:
            return self.run()[0]
        self.graph.replay()
        return self.outputs[0].clone()

    def capture(self, pool: object, stream: torch.cuda.Stream | None = None) -> None:
        self.graph, self.outputs = record(self.run, pool, stream)


class PatchStep(_Replayed):
    """The tower on one image of at most `patches` patches."""

    def __init__(self, tower: VisionTower, patches: int) -> None:
        self.tower, config = tower, tower.config
        self.x = torch.zeros(patches, config.embed_dim, dtype=tower.dtype, device=tower.device)
        self.angles = torch.zeros(2, patches, 1, config.head_dim // 2, dtype=torch.float32, device=tower.device)
        self.ends = torch.full((3,), patches, dtype=torch.int32, device=tower.device)
        self.ends[0] = 0

    def __call__(self, patch_embeds: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map the patch embeddings [n, E] of one image to features [n / 4, H]."""
        count = len(patch_embeds)
        with on_device(self.x):
            self.x[:count] = patch_embeds
            # Padding is masked, but what is masked must still be finite.
            self.x[count:].zero_()
            for angles, values in zip(self.angles, self.tower.rotary([grid])):
                angles[:count] = values
            self.ends[1] = count
            return self.result()[: count // self.tower.config.spatial_merge_size**2]

    def run(self) -> tuple[Tensor]:
        cos, sin = self.angles
        attend = within_padded(self.x, self.ends, self.tower.config.head_dim)
        return (self.tower.run(self.x, cos, sin, attend),)


class CapturedTower(VisionTower):
    """A tower, sharing its weights, that runs in steps; an image that fits none runs without."""

    def __init__(self, tower: VisionTower, buckets: Sequence[int] = PATCHES) -> None:
        vars(self).update(vars(tower))
        self.steps = {patches: PatchStep(tower, patches) for patches in sorted(buckets)}

    def forward(self, patch_embeds: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        counts = [height * width for height, width in grids]
        if sum(counts) != len(patch_embeds) or max(counts, default=0) > max(self.steps):
            return super().forward(patch_embeds, grids)
        features = []
        for image, grid, count in zip(patch_embeds.split(counts), grids, counts, strict=True):
            step = next(step for patches, step in self.steps.items() if patches >= count)
            features.append(step(image, grid))
        return torch.cat(features)


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


def captured(model: Model) -> tuple[Model, dict[str, float]]:
    """Return the model with its towers captured, on its GPU, and the seconds of each capture."""
    tower, seconds = CapturedTower(model.vision), dict[str, float]()
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
