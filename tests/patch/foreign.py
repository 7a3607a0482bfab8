"""Tiny random models of transformers, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SamVisionConfig,
    SamVisionModel,
)

from tests.helpers import normal, random_seed

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93
NEW_TOKENS = 16


def qwen(kind: str) -> nn.Module:
    """A model of 2 + 2 layers whose logits have a standard deviation of about one."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "pad_token_id": 0}
    text |= {"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    ids |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        made = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    elif kind == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "fullatt_block_indexes": [1]}
        made = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64}
        vision |= {"deepstack_visual_indexes": [0, 1], "patch_size": 16}
        text["head_dim"] = 16
        made = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    return filled(made)


def dinov2() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    return filled(Dinov2Model(Dinov2Config(patch_size=14, **sizes)))


def sam() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    made = SamVisionModel(SamVisionConfig(output_channels=16, global_attn_indexes=[1], window_size=2, **sizes))
    return filled(made)


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Random weights that let every input be seen in the output."""
    generator = random_seed("weights", type(model).__name__)
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / fan**0.5 if parameter.dim() > 1 else noise * 0.1 + (parameter == 1))
    return model.eval()


@dataclass
class Prompt:
    """Keyword arguments of `generate`; grids in patches, one per image."""

    inputs: dict[str, Any]

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]


def prompt(model: nn.Module, rows: list[list[tuple[int, int]]]) -> Prompt:
    """One row per list of image grids (height, width in patches), of different lengths, padded at the left."""
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    texts = []
    for number, grids in enumerate(rows):
        text = [5 + number, 17, 23]
        for height, columns in grids:
            text += [VISION_START, *[IMAGE] * (height * columns // 4), VISION_END, 31 + number]
        texts.append([*text, *range(40, 44 + 3 * number)])
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    grid = torch.tensor([[1, *size] for grids in rows for size in grids])
    pixels = normal(int(grid.prod(1).sum()), width, key=("pixels", rows))
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grid}
    return Prompt(given | {"mm_token_type_ids": (ids == IMAGE).int()})


ONE, THREE = [[(4, 6)]], [[(4, 6), (8, 4), (6, 6)]]
PADDED = [[(4, 6)], [(8, 4), (6, 6)]]
PROMPTS = {"1 image": ONE, "3 images": THREE, "batch 2, padded": PADDED}


def generate(model: nn.Module, given: Prompt, cache: str | None = None) -> tuple[Tensor, Tensor]:
    """Greedy ids [B, new] and the logits they were chosen from [new, B, vocabulary]; cache: None is DynamicCache."""
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    out = model.generate(
        **given.inputs,
        **options,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, given.ids.shape[1] :], torch.stack(out.logits)


BOUND = 1e-4
"""Absolute, on logits of standard deviation one; a wrong position or a lost token moves them by more than 0.1."""
each_qwen = pytest.mark.parametrize("kind", QWEN)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()
