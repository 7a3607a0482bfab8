"""Layers in the form that the Hugging Face `kernels` library maps: stateless, with the forward of what they replace.

    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(PatchEmbed, "VptPatchEmbed")  # transformers' class, any name
    layer = LocalLayerRepository(Path("hub"), layer_name="QwenVLPatchEmbed")  # this project's folder `hub`
    with use_kernel_mapping({"VptPatchEmbed": {"cpu": layer}}):
        model = kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)

A call that a kernel cannot serve, where weights are offloaded, adapted or hooked for instance, takes the forward of the
class that was replaced, as in `vpt_kernels.patch`; a layer without such a class raises ValueError with the reason.

`kernelize` says nothing when it replaces nothing: look at `CALLS`. It binds a layer to one module: shallow copies of
that module (`copy.copy`, DataParallel) keep the original's weights; kernelize the copy instead. Rotary embedding +
cache update is no layer of its own in these models; `vpt_kernels.patch` replaces it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from vpt_kernels.guard import OwnForward
from vpt_kernels.patch import embeds, projectors
from vpt_kernels.patch.rules import Rule, Serve, record

__all__ = [
    "Dinov2PatchEmbed",
    "MinimalCLIPProjector",
    "MinimalProjector",
    "MinimalSamProjector",
    "QwenVLPatchEmbed",
    "SamPatchEmbed",
]

CALLS: Counter[str] = Counter()
"""How often this module's layers were called, by what ran: "linear", "roi_patch_embed", "control_cross_attention", or
"original: reason". What a compiled or traced program runs is not counted."""

_QWEN, _DINOV2, _SAM, _PROJECTOR = ((rule, rule.make(nn.Module.forward)) for rule in (*embeds.RULES, *projectors.RULES))


def _served(layer: type[nn.Module], kernel: tuple[Rule, Serve], module: nn.Module, *inputs: Any) -> Any:
    """Return what the kernel makes of the call, or the own forward of the class that `layer` was mapped to."""
    rule, serve = kernel
    try:
        return serve(module, CALLS, *inputs)
    except OwnForward as declined:
        reason = declined.args[0]  # not str(): torch 2.11 cannot trace it
    own = type(module).forward
    if own is layer.forward:
        raise ValueError(f"{layer.__name__} cannot be computed: {reason}; it has no forward of its own")
    if rule.reject is not None:
        rule.reject(module, reason, *inputs)
    record(CALLS, f"original: {reason}")
    return own(module, *inputs)


class QwenVLPatchEmbed(nn.Module):
    """Patch embedding of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: [N, 3·T·p·p] floats or [N, p·p·3] bytes → [N, E]."""

    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _served(QwenVLPatchEmbed, _QWEN, self, hidden_states)


class Dinov2PatchEmbed(nn.Module):
    """Patch embedding of DINOv2: [B, 3, H, W] → [B, patches, E]."""

    has_backward = True

    def forward(self, pixel_values: Tensor) -> Tensor:
        return _served(Dinov2PatchEmbed, _DINOV2, self, pixel_values)


class SamPatchEmbed(nn.Module):
    """Patch embedding of SAM: [B, 3, H, W] → [B, rows, columns, E]."""

    has_backward = True

    def forward(self, pixel_values: Tensor) -> Tensor:
        return _served(SamPatchEmbed, _SAM, self, pixel_values)


def _without_intermediates(output_intermediate: bool, conditions: Tensor | None) -> None:
    if output_intermediate and conditions is not None:
        raise ValueError("output_intermediate is True; the operator has no intermediates: pass False")


class MinimalProjector(nn.Module):
    """The published DINOv2 projector: [images, tokens, D] → ([images · tokens, H], None)."""

    has_backward = False

    def forward(
        self, hidden_states: Tensor, conditions: Tensor | None = None, output_intermediate: bool = False
    ) -> tuple[Tensor, None]:
        _without_intermediates(output_intermediate, conditions)
        return _served(MinimalProjector, _PROJECTOR, self, hidden_states, conditions)


class MinimalSamProjector(nn.Module):
    """The published SAM projector: [images, C, h, w] → ([images · h · w / 16, H], None)."""

    has_backward = False

    def forward(
        self, hidden_states: Tensor, conditions: Tensor | None = None, output_intermediate: bool = False
    ) -> tuple[Tensor, None]:
        _without_intermediates(output_intermediate, conditions)
        return _served(MinimalSamProjector, _PROJECTOR, self, hidden_states, conditions)


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
        _without_intermediates(output_intermediate, conditions)
        return _served(MinimalCLIPProjector, _PROJECTOR, self, hidden_states, conditions, False, grid_thw)
