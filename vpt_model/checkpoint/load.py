"""Checkpoints: the published files into one configuration and one state dict, strictly; random weights for tests.

The state dict uses the names of the published checkpoints: `model.*`, `lm_head.weight`, `visual.*`, the projector of
the re-encoder (`clip_projector.*`, `detection_projector.*`, `seg_projector.*`) and the re-encoder itself
(`detection_model.*`, `seg_model.*`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from vpt_model.checkpoint.encoder_names import packed_name, state_name
from vpt_model.checkpoint.weights import Maps, Stored, read_json, stored_tensors
from vpt_model.config import DinoConfig, ModelConfig, SamConfig, VisionConfig, parse_config, require_type
from vpt_model.text.tokens import Tokenizer

# The released 2B's name of its projector; transformers' names since 4.52, which it writes where it is told to.
_RENAMES = {
    "depth_projector.": "clip_projector.",
    "model.language_model.": "model.",
    "model.visual.": "visual.",
}
_DRAWN = 1 << 20
"""Random numbers that are float32 at a time."""
_SHOWN = 10
"""Tensors of each kind of problem that an error names."""
_GAINS = ("lambda1",)
_TABLES = ("cls_token", "mask_token", "pos_embed", "position_embeddings")
Progress = Callable[[int, int], None]
"""Is told how many bytes of how many are done."""
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


def random_state(
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda done, total: None,
) -> dict[str, torch.Tensor]:
    """Return a random state dict, the same for the same config and seed (bf16 and fp16 are roundings of the float32
    values).

    Takes no more memory than the weights: they are drawn in pieces to where they stay, and what the language model
    fuses is adjacent.

    Scales keep activations and logits of order one (float32 noise in logits stays well below 1e-4), attention peaked
    enough that single tokens matter, and the projector's rank-one term half the features' size.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    state = empty_state(config, dtype)
    drawn_apart = [name for name in state if not (name == _HEAD and config.tie_word_embeddings)]
    total, done = sum(state[name].nbytes for name in drawn_apart), 0
    for name in drawn_apart:
        tensor = state[name]
        if name.endswith(_GAINS) or (name.endswith("weight") and ("norm" in name or "ln_q" in name)):
            scale, offset = 0.1, 1.0
        else:
            scale, offset = 0.1 if name.endswith("bias") else _weight_std(name, tuple(tensor.shape)), 0.0
        for piece in _pieces(tensor.view(-1)):
            drawn = torch.empty(piece.shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
            piece.copy_(drawn.mul_(scale).add_(offset))
        done += tensor.nbytes
        progress(done, total)
    return state


def _pieces(flat: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return parts of a flat tensor of which each draws what it would within the whole.

    normal_ fills 16 numbers at a time, and fewer than those in another way: no part is shorter than `_DRAWN`.
    """
    count = max(1, len(flat) // _DRAWN)
    return flat.tensor_split([index * _DRAWN for index in range(1, count)])


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


def check_state(config: ModelConfig, state: Mapping[str, torch.Tensor | Stored]) -> None:
    """Raise one ValueError that counts the missing, unexpected and misshapen tensors and mixed or integer dtypes.

    It names the first of each kind: a file of another model would otherwise fill screens.
    """
    require_type("config", config, ModelConfig, "a ModelConfig")
    require_type("state", state, Mapping, "a state dict: names to tensors")
    for name, tensor in state.items():
        require_type(f"{name!r:.80} of the state dict", tensor, (torch.Tensor, Stored), "a torch.Tensor")
    shapes = expected_shapes(config)
    dtypes = Counter(tensor.dtype for tensor in state.values() if tensor.dtype.is_floating_point)
    common = dtypes.most_common(1)[0][0] if dtypes else None
    problems = [
        [f"missing {name} {list(shape)}" for name, shape in shapes.items() if name not in state],
        [f"unexpected {name} {list(state[name].shape)}" for name in state if name not in shapes],
        [
            f"misshapen {name} {list(state[name].shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if name in state and tuple(state[name].shape) != shape
        ],
        [
            f"{name} is {tensor.dtype}; all tensors must share one floating dtype, most are {common}"
            for name, tensor in state.items()
            if tensor.dtype != common
        ],
    ]
    if count := sum(map(len, problems)):
        lines = [line for kind in problems for line in (*kind[:_SHOWN], *_rest(kind))]
        remedy = "give the config.json and the weights of one checkpoint"
        if _HEAD in shapes.keys() - state.keys():
            remedy += f", or set tie_word_embeddings in config.json if {_HEAD} is the embedding"
        raise ValueError(
            f"{count} problems between the tensors and the configuration ({remedy}):\n  " + "\n  ".join(lines)
        )


def _rest(lines: Sequence[str]) -> list[str]:
    return [f"… and {len(lines) - _SHOWN} more of this kind"] if len(lines) > _SHOWN else []


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds every tensor of `config` in one dtype, and nothing else; the weights are still in its files.

    tensors: the stored tensors under the names of `expected_shapes`. fields: the `config.json`. head: how its output
    head relates to the embedding. notices: what a user should know.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, Stored]
    fields: Mapping[str, Any]
    head: str
    notices: list[str]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Check the `config.json` and the weight files of a published VPT, converted or plain Qwen2-VL checkpoint.

        Weights: `*.safetensors` or, if there are none, `pytorch_model*.bin` (unpickled as weights only, so nothing in
        the file is executed), whole or sharded with an index. Configuration and tensors may have the names and the
        nesting of any version of transformers; `depth_projector.` is read as `clip_projector.`, as the released 2B
        file calls it. With tied embeddings `lm_head.weight` may be absent; if both are there and differ,
        the head is used for both, as the published loader does, with a notice.

        Raises ValueError naming the file for unreadable or corrupt files, shards that an index names but the folder
        lacks, unsupported configurations, and one that counts the missing, unexpected and misshapen tensors and names
        the first of them.
        """
        require_type("folder", folder, (str, PathLike), "a path")
        folder = Path(folder)
        fields = read_json(folder / "config.json")
        tensors = stored_tensors(folder)
        _rename(folder, tensors)
        try:
            config, notices = parse_config(fields, tensors), list[str]()
            _split_fused(config, tensors)
            head = _tie(tensors, notices) if config.tie_word_embeddings else "untied"
            check_state(config, tensors)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: {error}") from None
        ignored = sorted(name for name in fields if name.startswith("para_mask_") and fields[name])
        if ignored:
            notices.append(f"{', '.join(ignored)} in config.json ignored: these masks belong to training")
        return cls(folder, config, tensors, fields, head, notices)

    def load(self, dtype: torch.dtype | None = None, progress: Progress = lambda done, total: None) -> dict[str, Any]:
        """Return the state dict, in the stored dtype unless `dtype` is given.

        Takes no more memory than the weights: tensors in their stored dtype are the files' own pages (`Maps`), the
        others, and what is fused and the file keeps apart, are read to where they stay. What is fused is adjacent.
        """
        require_type("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype or None")
        if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
            raise TypeError(f"dtype is {dtype}; it must be floating point, of 16 bits or more, or None: as stored")
        groups, maps = fused_groups(self.config), Maps()
        state = dict.fromkeys(expected_shapes(self.config), torch.empty(0, dtype=torch.float32, device="cpu"))
        total, done = sum(self.tensors[name].nbytes for names in groups.values() for name in names), 0
        for names in groups.values():
            parts = [self.tensors[name] for name in names]
            wanted, rows = dtype or parts[0].dtype, [part.shape[0] for part in parts]
            whole = maps.tensor(parts) if wanted == parts[0].dtype else None
            if whole is None:
                whole = torch.empty(sum(rows), *parts[0].shape[1:], dtype=wanted, device="cpu")
                for part, place in zip(parts, whole.split(rows), strict=True):
                    part.read_into(place)
            state |= zip(names, whole.split(rows), strict=True)
            done += sum(part.nbytes for part in parts)
            progress(done, total)
        if self.config.tie_word_embeddings:
            state[_HEAD] = state[_EMBEDDING]
        return state

    def tokenizer(self) -> Tokenizer:
        """Return the folder's tokenizer. Raises ValueError where its vocabulary is not the one of the weights."""
        tokenizer = Tokenizer.from_folder(self.folder, self.config.kind)
        tokenizer.check_vocabulary(self.config.vocab_size, self.fields)
        return tokenizer


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Return configuration and state dict of a checkpoint folder (`Checkpoint.open`); its notices become warnings."""
    checkpoint = Checkpoint.open(folder)
    for notice in checkpoint.notices:
        warnings.warn(notice, stacklevel=2)
    return checkpoint.config, checkpoint.load(dtype)


def moved(state: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state dict on a device; tensors that share memory or are adjacent in memory still do and are."""
    if all(tensor.device == device for tensor in state.values()):
        return state
    whole: dict[int, torch.Tensor] = {}
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in whole:
            flat = tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            whole[storage.data_ptr()] = flat.to(device)
        result[name] = whole[storage.data_ptr()].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return result


def empty_state(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return uninitialised tensors of `expected_shapes`; those that `fused_groups` joins follow each other in one
    buffer.
    """
    shapes = expected_shapes(config)
    state = dict.fromkeys(shapes, torch.empty(0, dtype=dtype, device="cpu"))
    for names in fused_groups(config).values():
        rows = [shapes[name][0] for name in names]
        buffer = torch.empty(sum(rows), *shapes[names[0]][1:], dtype=dtype, device="cpu")
        state |= zip(names, buffer.split(rows), strict=True)
    if config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDING]
    return state


def fused_groups(config: ModelConfig) -> dict[str, list[str]]:
    """Return the names of a converted checkpoint, and the published tensors that each holds one after the other.

    Query, key and value are one tensor there, gate and up another; a tied head is absent.
    """
    groups: dict[str, list[str]] = {}
    for name in expected_shapes(config):
        fused = re.sub(r"^(model\.layers\.\d+\.self_attn\.)[qkv]_proj\.", r"\1qkv_proj.", name)
        fused = packed_name(re.sub(r"^(model\.layers\.\d+\.mlp\.)(gate|up)_proj\.", r"\1gate_up_proj.", fused))
        if not (name == _HEAD and config.tie_word_embeddings):
            groups.setdefault(fused, []).append(name)
    return groups


def published_tensors(
    config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of any stored form, one by one, under the names of the state dict; those that hold
    several are divided.

    Tied embeddings come last and once: as the head where both are stored, as the published loader has it.
    """
    shapes, groups, tied = expected_shapes(config), fused_groups(config), dict[str, torch.Tensor]()
    for stored, tensor in tensors:
        name = _renamed(stored)
        if config.tie_word_embeddings and name in (_EMBEDDING, _HEAD):
            tied[name] = tensor
        elif len(parts := groups.get(name, ())) > 1:
            yield from zip(parts, tensor.split([shapes[part][0] for part in parts]), strict=True)
        else:
            yield name, tensor
    if tied:
        yield _EMBEDDING, tied[_HEAD if _HEAD in tied else _EMBEDDING]


def _renamed(name: str) -> str:
    renamed = state_name(name)
    for old, new in _RENAMES.items():
        renamed = new + name.removeprefix(old) if name.startswith(old) else renamed
    return renamed


def _rename(folder: Path, tensors: dict[str, Stored]) -> None:
    for name in list(tensors):
        renamed = _renamed(name)
        if renamed != name:
            if renamed in tensors:
                raise ValueError(f"{folder} holds both {name} and {renamed}, two names of one tensor: remove one")
            tensors[renamed] = tensors.pop(name)


def _split_fused(config: ModelConfig, tensors: dict[str, Stored]) -> None:
    shapes = expected_shapes(config)
    for fused, names in fused_groups(config).items():
        rows = [shapes[name][0] for name in names]
        # One that does not fit is left as it is: an unexpected tensor.
        if len(names) > 1 and fused in tensors and tensors[fused].shape == (sum(rows), *shapes[names[0]][1:]):
            stored, begin = tensors.pop(fused), 0
            for name, count in zip(names, rows, strict=True):
                tensors[name] = stored.rows(begin, begin + count)
                begin += count


def _tie(tensors: dict[str, Stored], notices: list[str]) -> str:
    embedding, head = tensors.get(_EMBEDDING), tensors.get(_HEAD)
    one = embedding or head
    if one is not None and (head is None or embedding is None):
        tensors[_HEAD] = tensors[_EMBEDDING] = one
        return "tied, stored once"
    if head is None or embedding is None or (embedding.shape, embedding.dtype) != (head.shape, head.dtype):
        return "tied, but one of the two does not fit"
    same = all(torch.equal(*pieces) for pieces in zip(embedding.chunks(), head.chunks(), strict=True))
    if not same:
        notices.append(
            f"the configuration ties {_HEAD} to {_EMBEDDING} but the stored tensors differ; {_HEAD} is used for both"
        )
    tensors[_EMBEDDING] = head
    return f"tied, stored twice, {'equal' if same else 'not equal'}"
