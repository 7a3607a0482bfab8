"""Checkpoints: the published files into one configuration and one state dict, strictly; random weights for tests.

The state dict uses the names of the published Qwen2-VL checkpoints (`model.*`, `lm_head.weight`, `visual.*`) plus the
projector of the re-encoder (`clip_projector.*`).
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vpt_model.config import DinoConfig, ModelConfig, SamConfig, VisionConfig

# The authors' two names of their class, and the plain model it extends.
PERCEPTION_MODEL_TYPES = ("qwen2_vl_vpt", "vrt_qwen2_vl")
PLAIN_MODEL_TYPE = "qwen2_vl"

_KIND_OF_ENCODER = {"clip": "clip", "dino": "detection", "sam": "seg"}
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_CONSTANTS = ("rope_theta", "rms_norm_eps")
_RENAMES = {"depth_projector.": "clip_projector."}
_GAINS = ("lambda1",)
_TABLES = ("cls_token", "mask_token", "pos_embed", "position_embeddings")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of `config`."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
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
    shapes[_HEAD] = (config.vocab_size, hidden)
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
    """The published names, which are those of transformers' Dinov2Model behind a prefix."""
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
        shapes |= _linear(f"{layer}mlp.fc1", mlp, width)
        shapes |= _linear(f"{layer}mlp.fc2", width, mlp)
        shapes[f"{layer}layer_scale2.lambda1"] = (width,)
    return shapes | _norm("detection_model.layernorm", width)


def _sam_shapes(config: SamConfig) -> dict[str, tuple[int, ...]]:
    """The published names, which are those of transformers' SamVisionEncoder behind a prefix."""
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


def random_state(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A random state dict, the same for the same config and seed (bf16 and fp16 are roundings of the float32 values).

    Scales keep activations and logits of order one (float32 noise in logits stays well below 1e-4), attention peaked
    enough that single tokens matter, and the projector's rank-one term half the features' size.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, shape in expected_shapes(config).items():
        if name == _HEAD and config.tie_word_embeddings:
            state[name] = state[_EMBEDDING]
            continue
        tensor = torch.empty(shape).normal_(generator=generator)
        if name.endswith(_GAINS) or (name.endswith("weight") and ("norm" in name or "ln_q" in name)):
            tensor.mul_(0.1).add_(1.0)
        elif name.endswith("bias"):
            tensor.mul_(0.1)
        else:
            tensor.mul_(_weight_std(name, shape))
        state[name] = tensor.to(dtype)
    return state


def _weight_std(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith(_TABLES):
        return 0.5
    fan_in = math.prod(shape[1:])
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return math.sqrt(2.0 / fan_in)
    if name.endswith("linear_condition.weight"):
        # out = f + (f·k)k with k of variance s² adds a term of relative size s²·sqrt(width): here one half.
        return math.sqrt(0.5 / math.sqrt(fan_in) / fan_in)
    return 1.0 / math.sqrt(fan_in)


def check_state(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Raise one ValueError that lists every missing, unexpected and misshapen tensor, and mixed or integer dtypes."""
    shapes = expected_shapes(config)
    problems = [f"missing {name} {list(shape)}" for name, shape in shapes.items() if name not in state]
    problems += [f"unexpected {name} {list(state[name].shape)}" for name in state if name not in shapes]
    problems += [
        f"misshapen {name} {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    dtypes = sorted({str(tensor.dtype) for tensor in state.values()})
    if len(dtypes) > 1 or not all(tensor.is_floating_point() for tensor in state.values()):
        problems.append(f"dtypes {', '.join(dtypes)}; all tensors must share one floating dtype")
    if problems:
        raise ValueError(
            f"{len(problems)} problems between the tensors and the configuration:\n  " + "\n  ".join(problems)
        )


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Read `config.json` and the weights of a published VPT or plain Qwen2-VL checkpoint folder.

    Weights: `*.safetensors` or, if there are none, `pytorch_model*.bin` (unpickled as weights only, so nothing in the
    file is executed), whole or sharded with an index. `depth_projector.` is read as `clip_projector.`, as the released
    2B file calls it. With tied embeddings `lm_head.weight` may be absent; if both are there and differ, the head is
    used for both, as the published loader does, with a warning. Tensors keep their dtype unless `dtype` is given.

    Raises ValueError naming the file for unreadable or corrupt files, shards that an index names but the folder lacks,
    unsupported configurations, and one that lists all missing, unexpected and misshapen tensors.
    """
    folder = Path(folder)
    fields = _read_json(folder / "config.json")
    state = _read_weights(folder)
    for old, new in _RENAMES.items():
        for name in [name for name in state if name.startswith(old)]:
            renamed = new + name.removeprefix(old)
            if renamed in state:
                raise ValueError(f"{folder} holds both {name} and {renamed}, two names of one tensor: remove one")
            state[renamed] = state.pop(name)
    config = parse_config(fields, state)
    if config.tie_word_embeddings:
        _tie(state)
    check_state(config, state)
    if dtype is not None:
        tied = config.tie_word_embeddings
        state = {name: tensor.to(dtype) for name, tensor in state.items() if not (tied and name == _HEAD)}
        if tied:
            state[_HEAD] = state[_EMBEDDING]
    return config, state


def _tie(state: dict[str, torch.Tensor]) -> None:
    embedding, head = state.get(_EMBEDDING), state.get(_HEAD)
    if embedding is None:
        return
    if head is not None and not torch.equal(embedding, head):
        warnings.warn(
            f"the configuration ties {_HEAD} to {_EMBEDDING} but the stored tensors differ; {_HEAD} is used for both",
            stacklevel=3,
        )
        state[_EMBEDDING] = head
    state[_HEAD] = state[_EMBEDDING]


def parse_config(fields: Mapping[str, Any], names: Iterable[str] = ()) -> ModelConfig:
    """The ModelConfig of a `config.json`; `names` are the tensors' names, which tell the kind where the file does not.

    Fields that only matter in training, and token ids (they come from the tokenizer), are ignored. Raises ValueError
    for missing fields and for settings this implementation does not reproduce.
    """
    model_type = fields.get("model_type")
    if model_type not in (*PERCEPTION_MODEL_TYPES, PLAIN_MODEL_TYPE):
        known = ", ".join((*PERCEPTION_MODEL_TYPES, PLAIN_MODEL_TYPE))
        raise ValueError(f"config.json has model_type {model_type!r}; supported are {known}")
    missing = [name for name in (*_SIZES, *_CONSTANTS) if name not in fields]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: complete it from the model's page")
    bad = {name: fields[name] for name in _SIZES if type(fields[name]) is not int or fields[name] < 1}
    bad |= {name: fields[name] for name in _CONSTANTS if type(fields[name]) not in (int, float) or fields[name] <= 0}
    if bad:
        raise ValueError(f"config.json has {bad}; sizes must be positive integers, constants positive numbers")
    rope, vision = fields.get("rope_scaling") or {}, fields.get("vision_config") or {}
    unsupported = {
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(fields.get("use_sliding_window", False)),
        "projector_scale": fields.get("projector_scale", 1) != 1,
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"),
        "vision_config": vision.get("hidden_act", "quick_gelu") != "quick_gelu",
    }
    wrong = {name: fields[name] for name, is_wrong in unsupported.items() if is_wrong}
    if wrong:
        raise ValueError(
            f"config.json asks for {wrong}, which is not supported: only silu and quick_gelu, full attention, "
            "projector_scale 1 and default M-RoPE are"
        )
    # Published vision sections name only what differs from Qwen2-VL's defaults, and the channels by an older name.
    vision = {"in_channels": vision.get("in_chans", 3)} | vision | {"hidden_size": fields["hidden_size"]}
    return ModelConfig(
        **{name: fields[name] for name in (*_SIZES, *_CONSTANTS)},
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        kind=None if model_type == PLAIN_MODEL_TYPE else _kind(fields, names),
        vision=VisionConfig(**{k: v for k, v in vision.items() if k in VisionConfig.__dataclass_fields__}),
    )


def _kind(fields: Mapping[str, Any], names: Iterable[str]) -> str:
    declared = fields.get("vision_encoder_ls")
    if declared:
        encoders = [declared] if isinstance(declared, str) else list(declared)
        if len(encoders) != 1 or encoders[0] not in _KIND_OF_ENCODER:
            raise ValueError(
                f"config.json has vision_encoder_ls {declared!r}; it must name one of {list(_KIND_OF_ENCODER)}"
            )
        return _KIND_OF_ENCODER[encoders[0]]
    prefixes = {name.split("_projector.")[0] for name in names if "_projector." in name}
    kinds = prefixes & set(_KIND_OF_ENCODER.values())
    if len(kinds) != 1:
        raise ValueError(
            f"cannot tell the re-encoder: config.json has no vision_encoder_ls and the tensors have the projectors "
            f"{sorted(kinds) or 'of no kind'}; a VPT checkpoint needs exactly one of clip_projector, "
            "detection_projector and seg_projector"
        )
    return kinds.pop()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a checkpoint folder with config.json and weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    if type(content) is not dict:
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: download it again")
    return content


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    for pattern, index_name in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        index = folder / index_name
        files = _indexed_files(index) if index.exists() else sorted(folder.glob(pattern))
        if files:
            break
    else:
        raise ValueError(f"{folder} has no weights: expected *.safetensors or pytorch_model*.bin")
    state: dict[str, torch.Tensor] = {}
    for path in files:
        shard = _read_file(path)
        repeated = sorted(state.keys() & shard.keys())
        if repeated:
            raise ValueError(
                f"{path} repeats tensors of another file ({', '.join(repeated[:5])}): remove one of the two"
            )
        state |= shard
    return state


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names: download it again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names files outside its folder ({', '.join(outside)}): do not trust this checkpoint")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not in its folder: {', '.join(missing)}; download them")
    return [index.parent / name for name in names]


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights ({reason}): it is corrupt or not a plain state dict"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{path} is not a state dict of named tensors")
    return dict(content)
