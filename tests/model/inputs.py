"""Small models, images and golden data for the tests of vpt_model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from vpt_model.checkpoint import random_state
from vpt_model.config import ENCODERS, PRESETS, DinoConfig, ModelConfig, SamConfig, VisionConfig
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

    def known(kind: type, section: str) -> dict:
        values = sections[section].items()
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values if k in kind.__dataclass_fields__}

    return ModelConfig(
        **known(ModelConfig, "llm"),
        mrope_section=tuple(sections["mrope_section"]),
        kind=golden_kind(name),
        vision=VisionConfig(**known(VisionConfig, "vision")),
        dino=DinoConfig(**known(DinoConfig, "dinov2")),
        sam=SamConfig(**known(SamConfig, "sam_vision")),
    )


def golden_kind(name: str = "clip") -> str:
    return ENCODERS[golden(name)[1]["config"]["vpt"]["vision_encoder_ls"][0]]


def golden_state(name: str = "clip") -> dict[str, torch.Tensor]:
    """State dict of the golden model (checkpoint names, float32)."""
    return {k.removeprefix("weights."): v for k, v in golden(name)[0].items() if k.startswith("weights.")}


def golden_model(name: str = "clip") -> Model:
    return Model.from_state(golden_config(name), golden_state(name))


def golden_again(name: str, row: int = 0) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Pixel values of the image that the recorded model re-encodes in `row`, and its grid if the tower does it.

    Of "clip" [N, 1176]; of "dino" and "sam" [1, 3, h, w], without a grid.
    """
    tensors, _ = golden(name)
    if name == "clip":
        pixels = tensors["gen_b2.clip_pixel_values_row1" if row else "fwd.clip_pixel_values"]
        _, height, width = tensors["gen_b2.clip_images_grid_thw" if row else "fwd.clip_images_grid_thw"][row].tolist()
        return pixels, [(height, width)]
    if name == "dino":
        return tensors["gen_b2.detection_images_row1" if row else "fwd.detection_images"], []
    tile = tensors["gen_b2.seg_tile_row1_u8" if row else "fwd.seg_tiles_u8"].float()
    tile = tile.view(3, *tile.shape[-2:])
    size = golden_config(name).sam.image_size
    repeats = -(-size // tile.shape[-1])
    ramp = torch.arange(float(size))
    tiled = (tile / 64 - 2).repeat(1, repeats, repeats)[:, :size, :size]
    return (tiled + (ramp[:, None] - ramp) / 1024)[None], []


def golden_token_ids(name: str = "clip") -> TokenIds:
    """Token ids of the golden model of `name`; no token ends generation, as in the recorded runs."""
    ids, kind = golden(name)[1]["config"]["token_ids"], golden_kind(name)
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
        kind=kind,
        kind_pad=ids[f"{kind}_image_pad"],
        action_start=ids[f"{kind}_action_start"],
        action=ids[f"{kind}_action"],
        action_end=ids[f"{kind}_action_end"],
    )


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
