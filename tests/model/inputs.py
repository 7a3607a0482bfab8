"""Small models, images and golden data for the tests of vpt_model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from vpt_model.checkpoint import random_state
from vpt_model.config import PRESETS, ModelConfig, VisionConfig
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


@lru_cache(maxsize=4)
def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of `tests/golden/<name>` (weights upcast to float32, integers to int64) and its sidecar."""
    tensors = {}
    for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
        widen = {torch.float16: torch.float32, torch.int32: torch.int64}
        tensors[key] = value.to(widen.get(value.dtype, value.dtype))
    return tensors, json.loads((GOLDEN / f"{name}.json").read_text())


def golden_config(name: str = "clip") -> ModelConfig:
    """The configuration in the sidecar of `name`."""
    sections = golden(name)[1]["config"]
    text, vision = sections["llm"], sections["vision"]
    return ModelConfig(
        **{key: text[key] for key in ModelConfig.__dataclass_fields__ if key in text},
        mrope_section=tuple(sections["mrope_section"]),
        kind="clip",
        vision=VisionConfig(**{key: vision[key] for key in VisionConfig.__dataclass_fields__ if key in vision}),
    )


def golden_state(name: str = "clip") -> dict[str, torch.Tensor]:
    """State dict of the golden model (checkpoint names, float32)."""
    return {k.removeprefix("weights."): v for k, v in golden(name)[0].items() if k.startswith("weights.")}


def golden_model(name: str = "clip") -> Model:
    return Model.from_state(golden_config(name), golden_state(name))


def golden_token_ids(name: str = "clip") -> TokenIds:
    """Token ids of the golden model; `kind` is clip."""
    ids = golden(name)[1]["config"]["token_ids"]
    return TokenIds(
        im_start=ids["im_start"],
        im_end=ids["im_end"],
        vision_start=ids["vision_start"],
        vision_end=ids["vision_end"],
        image_pad=ids["image_pad"],
        endoftext=ids["endoftext"],
        newline=ids["nl"],
        system=ids["system"],
        user=ids["user"],
        assistant=ids["assistant"],
        stop=frozenset(),
        region_start=ids["region_token_start"],
        region_end=ids["region_token_end"],
        x=tuple(ids[f"x_{i}"] for i in range(8)),
        y=tuple(ids[f"y_{i}"] for i in range(8)),
        kind="clip",
        kind_pad=ids["clip_image_pad"],
        action_start=ids["clip_action_start"],
        action=ids["clip_action"],
        action_end=ids["clip_action_end"],
    )


def transformers_model(config: ModelConfig, state: dict[str, torch.Tensor], image_pad: int, vision_start: int):
    """transformers' own Qwen2-VL with the weights of `state` (which must have no projector), float32."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {key: getattr(config.vision, key) for key in VisionConfig.__dataclass_fields__}
    skip = ("rope_theta", "mrope_section", "kind", "vision", "tie_word_embeddings")
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
