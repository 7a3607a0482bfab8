"""Layers in the form that the Hugging Face `kernels` library maps: stateless, with the forward of what they replace.

    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(PatchEmbed, "VptPatchEmbed")  # transformers' class, any name
    layer = LocalLayerRepository(Path("hub"), layer_name="QwenVLPatchEmbed")  # this project's folder `hub`
    with use_kernel_mapping({"VptPatchEmbed": {"cpu": layer}}):
        model = kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)

`kernelize` says nothing when it replaces nothing: look at `CALLS`. Rotary embedding + cache update is no layer of its
own in these models; `vpt_kernels.patch` replaces it.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from vpt_kernels.patch import embeds, projectors

__all__ = [
    "Dinov2PatchEmbed",
    "MinimalCLIPProjector",
    "MinimalProjector",
    "MinimalSamProjector",
    "QwenVLPatchEmbed",
    "SamPatchEmbed",
]

CALLS: Counter[str] = Counter()
"""How often this module's layers were called, by what ran: "linear", "roi_patch_embed", "control_cross_attention"."""


class QwenVLPatchEmbed(nn.Module):
    """Patch embedding of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: [N, 3·T·p·p] floats or [N, p·p·3] bytes → [N, E]."""

    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return embeds.embed_flat_patches(self, hidden_states, CALLS)


class Dinov2PatchEmbed(nn.Module):
    """Patch embedding of DINOv2: [B, 3, H, W] → [B, patches, E]."""

    has_backward = True

    def forward(self, pixel_values: Tensor) -> Tensor:
        return embeds.embed_dinov2(self, pixel_values, CALLS)


class SamPatchEmbed(nn.Module):
    """Patch embedding of SAM: [B, 3, H, W] → [B, rows, columns, E]."""

    has_backward = True

    def forward(self, pixel_values: Tensor) -> Tensor:
        return embeds.embed_sam(self, pixel_values, CALLS)


def _project(
    module: nn.Module, features: Tensor, conditions: Tensor | None, output_intermediate: bool, grid_thw: Tensor | None
) -> tuple[Tensor, None]:
    if output_intermediate and conditions is not None:
        raise ValueError("output_intermediate is True; the operator has no intermediates: pass False")
    CALLS["control_cross_attention"] += 1
    return projectors.project(module, features, conditions, grid_thw), None


class MinimalProjector(nn.Module):
    """The published DINOv2 projector: [images, tokens, D] → ([images · tokens, H], None)."""

    has_backward = False

    def forward(
        self, hidden_states: Tensor, conditions: Tensor | None = None, output_intermediate: bool = False
    ) -> tuple[Tensor, None]:
        return _project(self, hidden_states, conditions, output_intermediate, None)


class MinimalSamProjector(nn.Module):
    """The published SAM projector: [images, C, h, w] → ([images · h · w / 16, H], None)."""

    has_backward = False

    def forward(
        self, hidden_states: Tensor, conditions: Tensor | None = None, output_intermediate: bool = False
    ) -> tuple[Tensor, None]:
        return _project(self, hidden_states, conditions, output_intermediate, None)


class MinimalCLIPProjector(nn.Module):
    """The published CLIP projector: [tokens, H], ragged by grid_thw → ([tokens, H], None)."""

    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        conditions: Tensor | None = None,
        output_intermediate: bool = False,
        grid_thw: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if conditions is None:
            return hidden_states, None
        return _project(self, hidden_states, conditions, output_intermediate, grid_thw)
