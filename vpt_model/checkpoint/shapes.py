"""Names and shapes of every tensor of a checkpoint, and which of them are one product's.

The state dict uses the names of the published checkpoints: `model.*`, `lm_head.weight`, `visual.*`, the projector of
the re-encoder (`clip_projector.*`, `detection_projector.*`, `seg_projector.*`) and the re-encoder itself
(`detection_model.*`, `seg_model.*`).
"""

from __future__ import annotations

import re

from vpt_model.checkpoint.encoder_names import packed_name
from vpt_model.config import DinoConfig, ModelConfig, SamConfig, VisionConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of `config`."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        for name, width in (("q", hidden), ("k", kv), ("v", kv)):
            shapes |= _linear(f"{layer}self_attn.{name}_proj", width, hidden)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[f"{layer}mlp.up_proj.weight"] = (mlp, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, mlp)
    shapes["model.norm.weight"] = (hidden,)
    shapes[HEAD] = (config.vocab_size, hidden)
    shapes |= _vision_shapes(config.vision)
    if config.kind is not None:
        width = {"clip": hidden, "detection": config.dino.hidden_size, "seg": config.sam.output_channels}[config.kind]
        shapes |= _norm(f"{config.kind}_projector.layernorm_feature", width)
        shapes |= _linear(f"{config.kind}_projector.linear_feature", hidden, width)
        shapes |= _norm(f"{config.kind}_projector.layernorm_condition", hidden)
        shapes |= _linear(f"{config.kind}_projector.linear_condition", hidden, hidden)
    if config.kind == "detection":
        shapes |= _dino_shapes(config.dino)
    if config.kind == "seg":
        shapes |= _affine("seg_projector.conv_feature", hidden, config.sam.output_channels, 4, 4)
        shapes |= _sam_shapes(config.sam)
    return shapes


def _vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    width, mlp = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (width, *patch)}
    for index in range(config.depth):
        block = f"visual.blocks.{index}."
        shapes |= _norm(f"{block}norm1", width)
        shapes |= _linear(f"{block}attn.qkv", 3 * width, width)
        shapes |= _linear(f"{block}attn.proj", width, width)
        shapes |= _norm(f"{block}norm2", width)
        shapes |= _linear(f"{block}mlp.fc1", mlp, width)
        shapes |= _linear(f"{block}mlp.fc2", width, mlp)
    merged = width * config.spatial_merge_size**2
    shapes |= _norm("visual.merger.ln_q", width)
    shapes |= _linear("visual.merger.mlp.0", merged, merged)
    shapes |= _linear("visual.merger.mlp.2", config.hidden_size, merged)
    return shapes


def _dino_shapes(config: DinoConfig) -> dict[str, tuple[int, ...]]:
    """Return the published names; those of SwiGLU, which no published variant has, are `encoder_names`' choice."""
    width, patch, mlp = config.hidden_size, config.patch_size, config.hidden_size * config.mlp_ratio
    embeddings = "detection_model.embeddings."
    shapes: dict[str, tuple[int, ...]] = {
        f"{embeddings}cls_token": (1, 1, width),
        f"{embeddings}mask_token": (1, width),
        f"{embeddings}position_embeddings": (1, 1 + (config.image_size // patch) ** 2, width),
    }
    shapes |= _affine(f"{embeddings}patch_embeddings.projection", width, 3, patch, patch)
    for index in range(config.num_hidden_layers):
        layer = f"detection_model.encoder.layer.{index}."
        shapes |= _norm(f"{layer}norm1", width)
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes |= _linear(f"{layer}attention.{name}", width, width)
        shapes[f"{layer}layer_scale1.lambda1"] = (width,)
        shapes |= _norm(f"{layer}norm2", width)
        if config.use_swiglu_ffn:
            # Two thirds of the width, up to a multiple of 8: transformers' rule.
            gated = (int(mlp * 2 / 3) + 7) // 8 * 8
            shapes |= _linear(f"{layer}mlp.gate_proj", gated, width)
            shapes |= _linear(f"{layer}mlp.up_proj", gated, width)
            shapes |= _linear(f"{layer}mlp.down_proj", width, gated)
        else:
            shapes |= _linear(f"{layer}mlp.fc1", mlp, width)
            shapes |= _linear(f"{layer}mlp.fc2", width, mlp)
        shapes[f"{layer}layer_scale2.lambda1"] = (width,)
    return shapes | _norm("detection_model.layernorm", width)


def _sam_shapes(config: SamConfig) -> dict[str, tuple[int, ...]]:
    """Return the published names, which are those of transformers' SamVisionEncoder behind a prefix."""
    width, patch, channels = config.hidden_size, config.patch_size, config.output_channels
    side, head_dim = config.image_size // patch, width // config.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {"seg_model.pos_embed": (1, side, side, width)}
    shapes |= _affine("seg_model.patch_embed.projection", width, 3, patch, patch)
    for index in range(config.num_hidden_layers):
        layer = f"seg_model.layers.{index}."
        window = side if index in config.global_attn_indexes else config.window_size
        shapes |= _norm(f"{layer}layer_norm1", width)
        shapes[f"{layer}attn.rel_pos_h"] = shapes[f"{layer}attn.rel_pos_w"] = (2 * window - 1, head_dim)
        shapes |= _linear(f"{layer}attn.qkv", 3 * width, width)
        shapes |= _linear(f"{layer}attn.proj", width, width)
        shapes |= _norm(f"{layer}layer_norm2", width)
        shapes |= _linear(f"{layer}mlp.lin1", config.mlp_dim, width)
        shapes |= _linear(f"{layer}mlp.lin2", width, config.mlp_dim)
    shapes["seg_model.neck.conv1.weight"] = (channels, width, 1, 1)
    shapes |= _norm("seg_model.neck.layer_norm1", channels)
    shapes["seg_model.neck.conv2.weight"] = (channels, channels, 3, 3)
    return shapes | _norm("seg_model.neck.layer_norm2", channels)


def _affine(name: str, rows: int, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, *weight), f"{name}.bias": (rows,)}


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return _affine(name, rows, columns)


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def fused_name(name: str) -> str:
    """Return the name of what holds the tensor in a converted checkpoint, with others or alone."""
    fused = re.sub(r"^(model\.layers\.\d+\.self_attn\.)[qkv]_proj\.", r"\1qkv_proj.", name)
    return packed_name(re.sub(r"^(model\.layers\.\d+\.mlp\.)(gate|up)_proj\.", r"\1gate_up_proj.", fused))


def fused_groups(config: ModelConfig) -> dict[str, list[str]]:
    """Return the names of a converted checkpoint, and the published tensors that each holds one after the other.

    Query, key and value are one tensor there, gate and up another; a tied head is absent.
    """
    groups: dict[str, list[str]] = {}
    for name in expected_shapes(config):
        if not (name == HEAD and config.tie_word_embeddings):
            groups.setdefault(fused_name(name), []).append(name)
    return groups
