"""Checkpoint folders that vLLM can serve: vpt-mini in float32, and tiny random ones of every kind and stored form."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from tests.model.checkpoints import fields, write
from vpt_model import mini
from vpt_model.checkpoint import Checkpoint, random_state
from vpt_model.checkpoint.convert import convert
from vpt_model.config import ENCODERS, PRESETS, ModelConfig
from vpt_model.text.tokens import Tokenizer

SMALL = ("tokenizer_config.json", "generation_config.json")
"""What readers of tokenizers need beside the vocabulary; those of vpt-mini, with the ids of another vocabulary."""


def served(folder: Path, tokenizer: Tokenizer) -> Path:
    """The folder, with the tokenizer and the small files that vLLM's front end reads."""
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    for name in SMALL:
        content = json.loads((mini.FOLDER / name).read_text())
        if "eos_token_id" in content:
            ids = tokenizer.ids
            content |= {"eos_token_id": [ids.im_end, ids.endoftext], "pad_token_id": ids.endoftext}
        (folder / name).write_text(json.dumps(content))
    return folder


def declared(config: ModelConfig, tokenizer: Tokenizer, **changes: object) -> dict[str, object]:
    """config.json of a VPT checkpoint, token ids included."""
    ids, kind = tokenizer.ids, config.kind
    return fields(
        config,
        **{
            "architectures": ["VPT_Qwen2VLForConditionalGeneration"],
            "torch_dtype": "float32",
            "vision_encoder_ls": [name for name, called in ENCODERS.items() if called == kind],
            "image_token_id": ids.image_pad,
            "vision_start_token_id": ids.vision_start,
            "vision_end_token_id": ids.vision_end,
            "para_start_id": ids.im_start,
            "para_end_id": ids.im_end,
            f"{kind}_image_token_id": ids.kind_pad,
            f"{kind}_action_start_id": ids.action_start,
            f"{kind}_action_id": ids.action,
        }
        | changes,
    )


def random_folder(folder: Path, kind: str, preset: str = "tiny", seed: int = 7) -> Path:
    """A checkpoint of random float32 weights: published names, one safetensors file."""
    config = replace(PRESETS[preset], kind=kind)
    tokenizer = Tokenizer.byte_level(config.vocab_size, kind)
    folder.mkdir(parents=True)
    state = random_state(config, seed)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    write(folder, state, declared(config, tokenizer, vision_config=vars(config.vision)))
    return served(folder, tokenizer)


def stored(folder: Path, form: str) -> Path:
    """The random clip model in another stored form.

    bin: pickled in four shards. vrt: under the older names, tied, with the projector called `depth_projector` and no
    word of its re-encoder. fused: as `vpt convert` writes it.
    """
    source = random_folder(folder.with_name(f"{folder.name}-source"), "clip")
    checkpoint = Checkpoint.open(source)
    if form == "fused":
        return convert(checkpoint, folder)
    config, tokenizer, state = checkpoint.config, checkpoint.tokenizer(), checkpoint.load(torch.float32)
    folder.mkdir()
    if form == "bin":
        write(folder, state, declared(config, tokenizer, vision_config=vars(config.vision)), shards=4, pickled=True)
        return served(folder, tokenizer)
    config = replace(config, tie_word_embeddings=True)
    # The released file stores both; the head counts.
    state = {name.replace("clip_projector.", "depth_projector."): tensor for name, tensor in state.items()}
    content = declared(config, tokenizer, model_type="vrt_qwen2_vl", vision_encoder_ls=None)
    content["architectures"] = ["VRT_Qwen2VLForConditionalGeneration"]
    write(folder, state, content | {"vision_config": vars(config.vision)}, pickled=True)
    return served(folder, tokenizer)


@lru_cache
def folder_of(name: str, root: Path) -> Path:
    """A folder of this name, made in `root` once: mini, clip, dino, sam, slice-clip, slice-dino, bin, vrt or fused."""
    folder = root / name
    if name == "mini":
        return mini.FOLDER
    if name in ("bin", "vrt", "fused"):
        return stored(folder, name)
    preset, _, encoder = name.rpartition("-")
    return random_folder(folder, ENCODERS[encoder], "2b-slice" if preset else "tiny")
