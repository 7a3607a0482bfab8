"""The operators as nn.Modules, to take the place of a model's own layers. Forward only; no state but weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vpt_kernels.append_visual_kv.api import append_visual_kv
from vpt_kernels.control_cross_attention.api import ControlProjector, control_cross_attention, scored
from vpt_kernels.patch.rules import folded, forget
from vpt_kernels.roi_patch_embed.api import FoldedPatchEmbed, fold_patch_weight, roi_patch_embed
from vpt_kernels.roi_patch_embed.geometry import RegionPolicy, plan_regions


class RoiPatchEmbed(nn.Module):
    """uint8 images and boxes → patch tokens; replaces image processor and patch embedding.

    `.to(dtype)` rounds the folded weight and keeps the bias in float32; on flat images it is more exact to make the
    module from a weight that has that dtype already.

    Args:
        weight: [E, 3, p, p] or [E, 3, T, p, p], a patch convolution's; bias: [E] or None.
        mean, std: per channel, of pixels scaled to 0…1.
        policy: how a crop becomes patches; its patch_size must be the weight's.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        policy: RegionPolicy,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        with torch.no_grad():
            embed = fold_patch_weight(weight, mean, std, bias)
        self.policy = policy
        self.patch_size = embed.patch_size
        self.register_buffer("weight", embed.weight)
        self.register_buffer("bias", embed.bias)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> RoiPatchEmbed:
        exact = self.bias
        super()._apply(function, recurse)
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        if self.bias.dtype != wide:
            # From before the conversion: rounding the bias and widening it again would lose its digits.
            self.bias = exact.to(self.bias.device, wide)
        forget(self)
        return self

    def forward(
        self, images: Sequence[Tensor], boxes: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Return tokens [Σ patches, E] and the grid (height, width) in patches of each box; default: every whole image.

        images: uint8 [height, width, 3]; boxes: (image, left, top, right, bottom), see `plan_regions`.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        if boxes is None:
            boxes = [(i, 0, 0, width, height) for i, (height, width) in enumerate(sizes)]
        plan = plan_regions(sizes, boxes, self.policy)
        weights = [self.weight, self.bias]
        embed = folded(self, weights, lambda: FoldedPatchEmbed(self.weight, self.bias, self.patch_size))
        return roi_patch_embed(images, plan, embed), plan.grids


class ControlCrossAttention(nn.Module):
    """A published projector (`MinimalProjector`, `MinimalSamProjector`, `MinimalCLIPProjector`) with its own weights.

    They are copies of the given ones, under the names of `ControlProjector`. What is folded from them follows when they
    are changed in place, replaced, converted, moved or loaded; only after a change through `.data`, which leaves no
    trace, call `.to()`.
    """

    _NAMES = tuple(name for name in ControlProjector.__dataclass_fields__ if not name.startswith("score"))

    def __init__(self, projector: ControlProjector) -> None:
        super().__init__()
        for name in self._NAMES:
            given = getattr(projector, name)
            # A convolution's weight was copied when it was folded: beside it, aliases would follow another module.
            self.register_buffer(name, None if given is None else given.detach().clone())

    @property
    def projector(self) -> ControlProjector:
        """The weights as they are now, and what follows from them.

        Raises:
            ValueError: they have several dtypes or devices.
        """
        weights: list[Any] = [getattr(self, name) for name in self._NAMES]
        present = [weight for weight in weights if weight is not None]
        contiguous: list[Any] = [weight if weight is None else weight.contiguous() for weight in weights]
        plain = ControlProjector(*contiguous)
        if torch.compiler.is_compiling():
            # A graph outlives the weights that it was made with: what it folds it would keep, or fold in every call.
            return scored(plain, score=False)
        known = folded(self, present, lambda: scored(plain))
        return replace(plain, score_weight=known.score_weight, score_bias=known.score_bias)

    @property
    def score_weight(self) -> Tensor | None:
        return self.projector.score_weight

    @property
    def score_bias(self) -> Tensor | None:
        return self.projector.score_bias

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> ControlCrossAttention:
        super()._apply(function, recurse)
        forget(self)
        return self

    def forward(self, features: Tensor, control: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return [tokens, H]; arguments as of `control_cross_attention`."""
        return control_cross_attention(features, control, self.projector, cu_seqlens)


class AppendVisualKV(nn.Module):
    """`append_visual_kv` with a model's table, sections and cache layout bound.

    Args:
        cos_sin: from `rotary_table`; sections, interleaved, layout: as of `append_visual_kv`.
    """

    def __init__(
        self,
        cos_sin: Tensor,
        sections: tuple[int, int, int] = (16, 24, 24),
        *,
        interleaved: bool = False,
        layout: str = "NHD",
    ) -> None:
        super().__init__()
        self.sections, self.interleaved, self.layout = sections, interleaved, layout
        # Always float32: a model converted to bfloat16 must keep its angles.
        self.cos_sin = cos_sin

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> AppendVisualKV:
        super()._apply(function, recurse)
        self.cos_sin = self.cos_sin.to(function(self.cos_sin).device)
        return self

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the rotated q; k and v are written into the caches."""
        return append_visual_kv(
            q,
            k,
            v,
            self.cos_sin,
            positions,
            slots,
            k_cache,
            v_cache,
            self.sections,
            interleaved=self.interleaved,
            layout=self.layout,
            k_scale=k_scale,
            v_scale=v_scale,
        )
