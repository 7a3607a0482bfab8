"""Trained weights as a checkpoint folder of the released models' layout: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.mini.conversations import CONFIG
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.mini.vocabulary import tokenizer

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "image_resolution",
)


def export(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the float16 weights of vpt-mini, its configuration and its tokenizer; each file appears when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = tokenizer().ids
    content = {
        "architectures": ["VPT_Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl_vpt",
        "vision_encoder_ls": ["clip"],
        "torch_dtype": "float16",
        **{name: getattr(CONFIG, name) for name in _SIZES},
        "rope_scaling": {"rope_type": "default", "mrope_section": list(CONFIG.mrope_section)},
        "vision_config": asdict(CONFIG.vision),
        "image_token_id": ids.image_pad,
        "vision_start_token_id": ids.vision_start,
        "vision_end_token_id": ids.vision_end,
        "clip_image_token_id": ids.kind_pad,
        "clip_action_start_id": ids.action_start,
        "clip_action_id": ids.action,
        "para_start_id": ids.im_start,
        "para_end_id": ids.im_end,
    }
    names = [name for name in expected_shapes(CONFIG) if name != "lm_head.weight"]
    tensors = {name: state[name].detach().to("cpu", torch.float16).contiguous() for name in names}
    _replace(folder / "config.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    _replace(folder / "tokenizer.json", lambda path: path.write_text(tokenizer().to_json()))
    _replace(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def _replace(path: Path, write) -> None:
    partial = path.with_name(f"{path.name}.incomplete")
    write(partial)
    os.replace(partial, path)
