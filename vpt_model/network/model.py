"""One VPT model: vision tower, language model, the re-encoder and its projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpt_kernels import ControlProjector, PackedWeight, fold_projector
from vpt_model.checkpoint.draw import Drawn
from vpt_model.checkpoint.load import check_state
from vpt_model.config import ModelConfig
from vpt_model.network.encoders import DinoEncoder, SamEncoder, build_encoder
from vpt_model.network.language import LanguageModel
from vpt_model.network.state import Progress, State
from vpt_model.network.vision import VisionTower

# The projector's form and the layer that makes its features. "clip" re-encodes by the vision tower itself, whose
# features pass unchanged: only the condition has weights that are used.
_PROJECTORS = {"clip": ("identity", None), "detection": ("linear", "linear_feature"), "seg": ("conv", "conv_feature")}


@dataclass(frozen=True)
class Model:
    """The parts an engine needs.

    encoder: None for kind "clip" (the vision tower is the re-encoder) and for a plain Qwen2-VL, whose `projector` is
    None too.
    """

    config: ModelConfig
    language: LanguageModel
    vision: VisionTower
    projector: ControlProjector | None
    encoder: DinoEncoder | SamEncoder | None = None

    @classmethod
    def from_state(
        cls,
        config: ModelConfig,
        state: Mapping[str, Tensor | Drawn | PackedWeight],
        weights: str | None = "auto",
        *,
        consume: bool = False,
        progress: Progress | None = None,
    ) -> Model:
        """Build from a state dict with the checkpoint's names, all tensors of one floating dtype on one device, or from
        `random_weights`, which are drawn one by one.

        weights: the precision in which the products' weights are kept, "float32", "bfloat16", "float16", "int8", "int4"
        or "w8a8" (int8, and activations of many rows rounded to 8 bits too); the default, "auto", is the stored one. On
        a CPU they are packed and the arithmetic is float32. Elsewhere, and with None, the arithmetic is in the stored
        precision and weights that need no fusing are shared with `state`. Weights that a folder stores packed stay what
        they are.
        consume: take the tensors out of `state`, a dict, one after the other, so that no weight is in memory twice;
        else it is not modified, and both are in memory. progress: is told how many bytes have found their place.

        Raises ValueError listing every missing, unexpected or misshapen tensor, for an unknown precision, and for
        another than the stored one where it cannot be had.
        """
        check_state(config, state)
        kept = State(state, weights, consume, progress or (lambda done: None))
        language, vision = LanguageModel(config, kept), VisionTower(config, kept)
        projector = encoder = None
        if config.kind is not None:
            projector = build_projector(config.kind, kept.tensors(f"{config.kind}_projector."))
        if config.kind in ("detection", "seg"):
            encoder, prefix = build_encoder(config.kind, config), f"{config.kind}_model."
            encoder.load(kept.within(prefix), kept.packed, consume=True)
        return cls(config, language, vision, projector, encoder)

    @property
    def dtype(self) -> torch.dtype:
        return self.language.dtype

    @property
    def device(self) -> torch.device:
        return self.language.device


def build_projector(kind: str, state: Mapping[str, torch.Tensor]) -> ControlProjector:
    """Return the projector of a re-encoder's kind, folded. state: its tensors, under the checkpoint's names."""

    def layer(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[f"{kind}_projector.{name}.weight"], state[f"{kind}_projector.{name}.bias"]

    form, feature = _PROJECTORS[kind]
    weights: dict[str, Any] = {"condition_norm": layer("layernorm_condition"), "condition": layer("linear_condition")}
    if feature is not None:
        weights |= {"feature_norm": layer("layernorm_feature"), "feature": layer(feature)}
    return fold_projector(form, **weights)
