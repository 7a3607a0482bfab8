"""One VPT model: vision tower, language model and the projector of its re-encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vpt_kernels import ControlProjector, fold_projector
from vpt_model.checkpoint import check_state
from vpt_model.config import ModelConfig
from vpt_model.language import LanguageModel
from vpt_model.vision import VisionTower


@dataclass(frozen=True)
class Model:
    """The parts an engine needs; `projector` is None for a plain Qwen2-VL."""

    config: ModelConfig
    language: LanguageModel
    vision: VisionTower
    projector: ControlProjector | None

    @classmethod
    def from_state(cls, config: ModelConfig, state: Mapping[str, torch.Tensor]) -> Model:
        """Build from a state dict with the checkpoint's names, all tensors of one floating dtype on one device.

        Raises ValueError listing every missing, unexpected or misshapen tensor. Weights that need no fusing are
        shared with `state`, which is not modified.
        """
        check_state(config, state)
        state = {name: tensor.detach() for name, tensor in state.items()}
        projector = None
        if config.kind == "clip":
            # The re-encoder is the vision tower itself: its features pass unchanged, only the condition has weights.
            projector = fold_projector(
                "identity",
                condition_norm=(
                    state["clip_projector.layernorm_condition.weight"],
                    state["clip_projector.layernorm_condition.bias"],
                ),
                condition=(
                    state["clip_projector.linear_condition.weight"],
                    state["clip_projector.linear_condition.bias"],
                ),
            )
        return cls(config, LanguageModel(config, state), VisionTower(config, state), projector)

    @property
    def dtype(self) -> torch.dtype:
        return self.language.dtype

    @property
    def device(self) -> torch.device:
        return self.language.device
