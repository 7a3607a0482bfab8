"""Checkpoint folders in the layouts of the released ones, in tiny shapes, with the published names of every tensor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from tests.model.inputs import tiny_config
from vpt_model.checkpoint import random_state
from vpt_model.config import ENCODERS, ModelConfig
from vpt_model.text.tokens import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# The released 2B model's file, token ids and training-only fields included.
PUBLISHED_2B = {
    "architectures": ["VRT_Qwen2VLForConditionalGeneration"],
    "model_type": "vrt_qwen2_vl",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    "vision_config": {"hidden_size": 1536, "in_chans": 3, "model_type": "vrt_qwen2_vl", "spatial_patch_size": 14},
    "clip_action_id": 151677,
    "num_inner_forward_run": 2,
    "para_mask_id": 1,
    "para_mask_ratio": 0.5,
    "projector_scale": 1,
    "vision_encoder_ls": ["clip"],
    "use_cache": False,
}


@dataclass(frozen=True)
class Variant:
    """One released checkpoint: its re-encoder, its files, and whether it was only aligned."""

    kind: str
    shards: int
    model_type: str = "qwen2_vl_vpt"
    tied: bool = True
    aligned: bool = False
    projector: str = ""


VARIANTS = {
    "Qwen2-VL-2b-VPT-CLIP": Variant("clip", 1, "vrt_qwen2_vl", projector="depth_projector."),
    "Qwen2-VL-2b-VPT-Det": Variant("detection", 2),
    "Qwen2-VL-2b-VPT-Det-NoPrompt": Variant("detection", 2),
    "Qwen2-VL-2b-VPT-Seg": Variant("seg", 2),
    "Qwen2-VL-2b-VPT-Det-Alignment": Variant("detection", 2, aligned=True),
    "Qwen2-VL-2b-VPT-Seg-Alignment": Variant("seg", 2, aligned=True),
    "Qwen2-VL-7b-VPT-CLIP": Variant("clip", 4, tied=False),
}


def fields(config: ModelConfig | None = None, **changes: Any) -> dict[str, Any]:
    """config.json of the tiny preset as the authors write it, with the shapes that theirs leaves to defaults.

    A change to None removes a field.
    """
    config = config or tiny_config()
    content = {
        "model_type": "qwen2_vl" if config.kind is None else "qwen2_vl_vpt",
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "in_chans": 3},
        "dinov2": asdict(config.dino),
        "sam_vision": asdict(config.sam),
    }
    for name in PUBLISHED_2B.keys() & vars(config).keys():
        content[name] = getattr(config, name)
    return {name: value for name, value in (content | changes).items() if value is not None}


def write_weights(folder: Path, state: dict[str, torch.Tensor], shards: int = 1, pickled: bool = False) -> None:
    """The weights, sharded with an index where asked."""
    suffix, stem = (".bin", "pytorch_model") if pickled else (".safetensors", "model")
    weight_map, names = {}, sorted(state)
    for shard in range(shards):
        file = f"{stem}{suffix}" if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}{suffix}"
        part = {name: state[name].clone() for name in names[shard::shards]}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def write(
    folder: Path,
    state: dict[str, torch.Tensor],
    content: dict[str, Any] | None = None,
    shards: int = 1,
    pickled: bool = False,
) -> Path:
    """config.json and weights."""
    (folder / "config.json").write_text(json.dumps(content or fields()))
    write_weights(folder, state, shards, pickled)
    return folder


def write_variant(folder: Path, name: str, seed: int = 0) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A folder like the released checkpoint `name`; its configuration and its state under the loader's names."""
    variant = VARIANTS[name]
    config = replace(tiny_config(variant.kind), tie_word_embeddings=variant.tied)
    state = random_state(config, seed, torch.bfloat16)
    tokenizer = byte_level(config, variant.aligned)
    ids, kind = tokenizer.ids, variant.kind
    content = fields(
        config,
        model_type=variant.model_type,
        vision_encoder_ls=[name for name, called in ENCODERS.items() if called == kind],
        torch_dtype="bfloat16",
        para_mask_id=0 if variant.aligned else 1,
        para_mask_ratio=0.0 if variant.aligned else 0.5,
        num_inner_forward_run=1 if variant.aligned else 2,
        projector_scale=1,
        **{f"{kind}_image_token_id": ids.kind_pad, f"{kind}_action_start_id": ids.action_start},
        **{f"{kind}_action_id": ids.action, "para_start_id": ids.im_start, "para_end_id": ids.im_end},
    )
    folder.mkdir(exist_ok=True)
    projector = f"{kind}_projector."
    published = {n.replace(projector, variant.projector or projector): tensor for n, tensor in state.items()}
    write(folder, published, content, variant.shards, pickled=True)
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    return config, state


def byte_level(config: ModelConfig, aligned: bool = False) -> Tokenizer:
    """The tiny tokenizer; `aligned`: before region and action tokens were added to it."""
    tokenizer = Tokenizer.byte_level(config.vocab_size, config.kind)
    if not aligned:
        return tokenizer
    content = json.loads(tokenizer._backend.to_str())
    later = {token["content"] for token in content["added_tokens"] if not token["special"]}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in later]
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if t not in later}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), config.kind)
