"""The Qwen2-VL vision tower: uint8 images and boxes in, one feature sequence per box out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vpt_kernels import RegionPlan, RegionPolicy, fold_patch_weight, plan_regions, roi_patch_embed
from vpt_model.config import ModelConfig
from vpt_model.network import fused
from vpt_model.network.attention import Within, within
from vpt_model.network.capture import uploaded
from vpt_model.network.linear import linear, onto
from vpt_model.network.positions import vision_positions
from vpt_model.network.state import State, Weight

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel mean and standard deviation of the images the tower was trained on (CLIP's, RGB in 0..1)."""

_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0

Affine = tuple[torch.Tensor, torch.Tensor]
Product = tuple[Weight, torch.Tensor]


@dataclass(frozen=True)
class _Block:
    norm1: Affine
    qkv: Product
    proj: Product
    norm2: Affine
    fc1: Product
    fc2: Product


class VisionTower:
    """Qwen2-VL's vision tower, built from the `visual.*` tensors of a state dict; forward only.

    Source: Qwen2-VL in transformers. A still image fills both temporal slots of a patch with the same frame, so `look`
    embeds patches with the folded weight (1/255, mean, std and the temporal sum are inside it).
    """

    def __init__(self, config: ModelConfig, state: State) -> None:
        self.config, self.dtype, self.device = config.vision, state.dtype, state.device

        def norm(name: str) -> Affine:
            return state.tensor(f"visual.{name}.weight"), state.tensor(f"visual.{name}.bias")

        def product(name: str) -> Product:
            return state.weight(f"visual.{name}.weight"), state.tensor(f"visual.{name}.bias")

        patches = "visual.patch_embed.proj.weight"
        self.patch_embed = fold_patch_weight(state.table(patches), MEAN, STD, dtype=self.dtype)
        self.patch_weight = state.weight(patches)
        self.blocks = [
            _Block(
                norm1=norm(f"blocks.{index}.norm1"),
                qkv=product(f"blocks.{index}.attn.qkv"),
                proj=product(f"blocks.{index}.attn.proj"),
                norm2=norm(f"blocks.{index}.norm2"),
                fc1=product(f"blocks.{index}.mlp.fc1"),
                fc2=product(f"blocks.{index}.mlp.fc2"),
            )
            for index in range(self.config.depth)
        ]
        self.merger_norm = norm("merger.ln_q")
        quarter = self.config.head_dim // 4
        frequencies = 1.0 / _ROPE_THETA ** (torch.arange(quarter, dtype=torch.float32, device="cpu") / quarter)
        self.frequencies = frequencies.to(self.device)
        self.merger_fc1, self.merger_fc2 = map(product, ("merger.mlp.0", "merger.mlp.2"))

    def look(
        self,
        images: Sequence[torch.Tensor],
        boxes: Sequence[tuple[int, int, int, int, int]],
        policy: RegionPolicy,
    ) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """Return features of each box of the images: `[n_i, H]` in row-major order of the merged grid, and grids in
        patches.

        images: uint8 [height, width, 3]. boxes: (image, left, top, right, bottom) in pixels, right and bottom
        exclusive. policy: how a box is resized (`qwen2_vl_policy`). Raises ValueError for a box outside its image.
        """
        patch_embeds, grids = self.embed_regions(images, boxes, policy)
        tokens = [height * width // self.config.spatial_merge_size**2 for height, width in grids]
        return list(self.forward(patch_embeds, grids).split(tokens)), grids

    def embed_regions(
        self,
        images: Sequence[torch.Tensor],
        boxes: Sequence[tuple[int, int, int, int, int]],
        policy: RegionPolicy,
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Crop, resize and embed, the first half of `look`; return patch embeddings `[N, E]` of all boxes and grids in
        patches.
        """
        plan = self.plan(images, boxes, policy)
        return self.embed_plan(images, plan), list(plan.grids)

    def plan(
        self,
        images: Sequence[torch.Tensor],
        boxes: Sequence[tuple[int, int, int, int, int]],
        policy: RegionPolicy,
    ) -> RegionPlan:
        """Return how `look` will crop and resize; of the images, only their sizes are read."""
        return plan_regions([(image.shape[0], image.shape[1]) for image in images], boxes, policy)

    def embed_plan(self, images: Sequence[torch.Tensor], plan: RegionPlan) -> torch.Tensor:
        """Crop, resize and embed as planned: patch embeddings `[N, E]` of all boxes."""
        return roi_patch_embed(images, plan, self.patch_embed)

    def embed_pixel_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch embeddings `[N, E]` of the normalised patches float `[N, 3 * T * p * p]` of transformers' processor.

        The temporal slices of a patch may differ here.
        """
        return linear(pixel_values.to(self.device, self.dtype), self.patch_weight)

    def forward(self, patch_embeds: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Run the blocks and the merger: patch embeddings `[N, E]` → features `[N / 4, H]`.

        grids: (height, width) in patches of each image; patches attend within their image only. Raises ValueError if
        the grids do not make N patches.
        """
        lengths = [height * width for height, width in grids]
        if not lengths or sum(lengths) != patch_embeds.shape[0]:
            raise ValueError(
                f"{patch_embeds.shape[0]} patch embeddings were given, but the grids {list(grids)} make "
                f"{sum(lengths)}: give the grid of every image, and at least one image"
            )
        attend = within(patch_embeds, lengths, self.config.head_dim)
        return self.run(patch_embeds, *self.rotary(grids), attend)

    def run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Within) -> torch.Tensor:
        """Run blocks and merger: patches [N, E] and their angles → features [N / 4, H]; the host reads nothing.

        attend: q, k, v [N, heads, D] → [N, heads · D].
        """
        delta: torch.Tensor | None = None
        for block in self.blocks:
            x, normed = fused.add_layer_norm(x, delta, *block.norm1, _NORM_EPS)
            x, delta = onto(x, self._attention(block, normed, cos, sin, attend), *block.proj)
            x, normed = fused.add_layer_norm(x, delta, *block.norm2, _NORM_EPS)
            x, delta = onto(x, linear(normed, *block.fc1, activation="quick_gelu"), *block.fc2)
        _, merged = fused.add_layer_norm(x, delta, *self.merger_norm, _NORM_EPS)
        merged = merged.reshape(-1, merged.shape[1] * self.config.spatial_merge_size**2)
        return linear(linear(merged, *self.merger_fc1, activation="gelu"), *self.merger_fc2)

    def rotary(self, grids: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin float32 [N, 1, head_dim / 2]: row angles in the first half, then column angles."""
        coordinates = vision_positions(grids, self.config.spatial_merge_size)
        return self.angles(uploaded(coordinates, self.device))

    def angles(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `rotary` does for rows and columns [N, 2] of patches on the device; the host reads nothing."""
        angles = (coordinates[:, :, None] * self.frequencies).flatten(1)[:, None]
        return angles.cos(), angles.sin()

    def _attention(
        self, block: _Block, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Within
    ) -> torch.Tensor:
        packed = linear(x, *block.qkv).view(-1, 3, self.config.num_heads, self.config.head_dim)
        return attend(*fused.rotate_packed(packed, cos, sin))
