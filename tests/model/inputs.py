"""Small models, images and golden data for the tests of vpt_model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from vpt_model.checkpoint import random_state
from vpt_model.config import PRESETS, ModelConfig, VisionConfig
from vpt_model.golden import Recording, load_recording
from vpt_model.model import Model
from vpt_model.tokens import TokenIds

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def tiny_config(kind: str | None = "clip") -> ModelConfig:
    return replace(PRESETS["tiny"], kind=kind)


@lru_cache(maxsize=4)
def tiny_state(kind: str | None = "clip", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 state dict of the tiny preset; shared between tests, so do not write to it."""
    return random_state(tiny_config(kind), seed)


@lru_cache(maxsize=4)
def tiny_model(kind: str | None = "clip", seed: int = 0) -> Model:
    return Model.from_state(tiny_config(kind), tiny_state(kind, seed))


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [height, width, 3]."""
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=5)
def recording(name: str) -> Recording:
    return load_recording(GOLDEN, name)


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of `tests/golden/<name>` (weights upcast to float32, integers to int64) and its sidecar."""
    return recording(name).tensors, recording(name).meta


def golden_config(name: str = "clip") -> ModelConfig:
    """The configuration in the sidecar of `name`."""
    return recording(name).config


def golden_state(name: str = "clip") -> dict[str, torch.Tensor]:
    """State dict of the golden model (checkpoint names, float32)."""
    return recording(name).state


def golden_again(name: str, row: int = 0) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Pixel values of the image that the recorded model re-encodes in `row`, and its grid if the tower does it."""
    return recording(name).reencoded_pixels(row)


def golden_token_ids(name: str = "clip") -> TokenIds:
    """Token ids of the golden model of `name`; no token ends generation, as in the recorded runs."""
    return recording(name).ids


def transformers_model(config: ModelConfig, state: dict[str, torch.Tensor], image_pad: int, vision_start: int):
    """transformers' own Qwen2-VL with the weights of `state` (which must have no projector), float32."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {key: getattr(config.vision, key) for key in VisionConfig.__dataclass_fields__}
    skip = ("rope_theta", "mrope_section", "kind", "vision", "dino", "sam", "tie_word_embeddings")
    text = {key: getattr(config, key) for key in ModelConfig.__dataclass_fields__ if key not in skip}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": list(config.mrope_section)}
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
            vision_config=vision | {"mlp_ratio": int(config.vision.mlp_ratio)},
            tie_word_embeddings=config.tie_word_embeddings,
            image_token_id=image_pad,
            vision_start_token_id=vision_start,
        )
    )
    names = {"model.": "model.language_model.", "visual.": "model.visual."}
    renamed = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    model.load_state_dict(renamed, strict=True)
    return model.eval()
