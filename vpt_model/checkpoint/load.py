"""Checkpoints: the published files into one configuration and one state dict, strictly."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from vpt_kernels import PackedWeight
from vpt_model.checkpoint.draw import Drawn, Progress
from vpt_model.checkpoint.encoder_names import state_name
from vpt_model.checkpoint.packed import (
    declared,
    mapped,
    outlines,
    precision_of,
    taken_apart,
    tensors_of,
    undeclared,
    wanted,
)
from vpt_model.checkpoint.shapes import EMBEDDING, HEAD, expected_shapes, fused_groups
from vpt_model.checkpoint.weights import Maps, Stored, read_json, stored_tensors
from vpt_model.config import ModelConfig, parse_config, require_type
from vpt_model.text.tokens import Tokenizer

# The released 2B's name of its projector; transformers' names since 4.52, which it writes where it is told to.
_RENAMES = {
    "depth_projector.": "clip_projector.",
    "model.language_model.": "model.",
    "model.visual.": "visual.",
}
_SHOWN = 10
"""Tensors of each kind of problem that an error names."""


def check_state(config: ModelConfig, state: Mapping[str, torch.Tensor | Drawn | PackedWeight]) -> None:
    """Raise one ValueError that counts the missing, unexpected and misshapen tensors and mixed or integer dtypes.

    It names the first of each kind: a file of another model would otherwise fill screens.
    """
    require_type("config", config, ModelConfig, "a ModelConfig")
    require_type("state", state, Mapping, "a state dict: names to tensors")
    for name, tensor in state.items():
        kinds = (torch.Tensor, Drawn, PackedWeight)
        require_type(f"{name!r:.80} of the state dict", tensor, kinds, "a torch.Tensor")
    _check(config, taken_apart(config, state), precision_of(state))


def _check(config: ModelConfig, tensors: Mapping[str, torch.Tensor | Stored | Drawn], weights: str | None) -> None:
    """Do what `check_state` says. weights: the precision in which they are packed; None where they are not."""
    expected = wanted(config, weights)
    apart = {name: dtype for name, (_, dtype) in expected.items() if dtype is not None}
    dtypes = Counter(one.dtype for name, one in tensors.items() if name not in apart and one.dtype.is_floating_point)
    common = dtypes.most_common(1)[0][0] if dtypes else None
    problems = [
        [f"missing {name} {list(shape)}" for name, (shape, _) in expected.items() if name not in tensors],
        [f"unexpected {name} {list(tensors[name].shape)}" for name in tensors if name not in expected],
        [
            f"misshapen {name} {list(tensors[name].shape)}, expected {list(shape)}"
            for name, (shape, _) in expected.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
        [
            f"{name} is {tensor.dtype}; all tensors must share one floating dtype, most are {common}"
            for name, tensor in tensors.items()
            if name not in apart and tensor.dtype != common
        ],
        [
            f"{name} is {tensors[name].dtype}; packed in {weights}, it is {dtype}"
            for name, dtype in apart.items()
            if name in tensors and tensors[name].dtype != dtype
        ],
    ]
    if count := sum(map(len, problems)):
        lines = [line for kind in problems for line in (*kind[:_SHOWN], *_rest(kind))]
        remedy = "give the config.json and the weights of one checkpoint"
        if HEAD in expected.keys() - tensors.keys():
            remedy += f", or set tie_word_embeddings in config.json if {HEAD} is the embedding"
        raise ValueError(
            f"{count} problems between the tensors and the configuration ({remedy}):\n  " + "\n  ".join(lines)
        )


def _rest(lines: Sequence[str]) -> list[str]:
    return [f"… and {len(lines) - _SHOWN} more of this kind"] if len(lines) > _SHOWN else []


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds every tensor of `config` in one dtype, and nothing else; the weights are still in its files.

    tensors: the stored tensors under the names of `expected_shapes` or, of packed weights, of `packed.wanted`. fields:
    the `config.json`. head: how its output head relates to the embedding. notices: what a user should know. weights:
    the precision in which products' weights are stored packed; None where they are not.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, Stored]
    fields: Mapping[str, Any]
    head: str
    notices: list[str]
    weights: str | None = None

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
            weights, notices = declared(fields), list[str]()
            config = parse_config(fields if weights is None else undeclared(fields), tensors)
            _split_fused(config, tensors)
            head = "untied"
            if config.tie_word_embeddings:
                head = _tie(tensors, notices) if weights is None else "tied, stored once"
            _check(config, tensors, weights)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: {error}") from None
        ignored = sorted(name for name in fields if name.startswith("para_mask_") and fields[name])
        if ignored:
            notices.append(f"{', '.join(ignored)} in config.json ignored: these masks belong to training")
        return cls(folder, config, tensors, fields, head, notices, weights)

    def load(self, dtype: torch.dtype | None = None, progress: Progress = lambda done, total: None) -> dict[str, Any]:
        """Return the state dict, in the stored dtype unless `dtype` is given.

        Takes no more memory than the weights: tensors in their stored dtype are the files' own pages (`Maps`), the
        others, and what is fused and the file keeps apart, are read to where they stay. What is fused is adjacent.
        What is stored packed is one `PackedWeight`, in the file's pages, under its name in the folder; with a `dtype`
        it becomes the tensors of its numbers.
        """
        require_type("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype or None")
        if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
            raise TypeError(f"dtype is {dtype}; it must be floating point, of 16 bits or more, or None: as stored")
        shapes, groups, maps = expected_shapes(self.config), fused_groups(self.config), Maps()
        packed = {} if self.weights is None else outlines(self.config, self.weights)
        kept = {name: tensors_of(name, packed[name]) if name in packed else parts for name, parts in groups.items()}
        total, done = sum(self.tensors[name].nbytes for names in kept.values() for name in names), 0
        found: dict[str, Any] = {}
        for name, parts in groups.items():
            rows = [shapes[part][0] for part in parts]
            if name not in packed:
                whole = _joined([self.tensors[part] for part in parts], dtype, maps)
                found |= zip(parts, whole.split(rows), strict=True)
            else:
                weight = mapped(name, packed[name], self.tensors, maps)
                if dtype is None:
                    found[name] = weight
                else:
                    found |= zip(parts, weight.dequantize(dtype).split(rows), strict=True)
            done += sum(self.tensors[part].nbytes for part in kept[name])
            progress(done, total)
        if self.config.tie_word_embeddings:
            found[HEAD] = found[EMBEDDING]
        return {name: found[name] for name in (*shapes, *packed) if name in found}

    def tokenizer(self) -> Tokenizer:
        """Return the folder's tokenizer. Raises ValueError where its vocabulary is not the one of the weights."""
        tokenizer = Tokenizer.from_folder(self.folder, self.config.kind)
        tokenizer.check_vocabulary(self.config.vocab_size, self.fields)
        return tokenizer


def _joined(parts: Sequence[Stored], dtype: torch.dtype | None, maps: Maps) -> torch.Tensor:
    """Return one tensor of all parts, one behind the other: mapped where that is possible, else read."""
    wanted = dtype or parts[0].dtype
    whole = maps.tensor(parts) if wanted == parts[0].dtype else None
    if whole is None:
        rows = [part.shape[0] for part in parts]
        whole = torch.empty(sum(rows), *parts[0].shape[1:], dtype=wanted, device="cpu")
        for part, place in zip(parts, whole.split(rows), strict=True):
            part.read_into(place)
    return whole


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Return configuration and state dict of a checkpoint folder (`Checkpoint.open`); its notices become warnings."""
    checkpoint = Checkpoint.open(folder)
    for notice in checkpoint.notices:
        warnings.warn(notice, stacklevel=2)
    return checkpoint.config, checkpoint.load(dtype)


def moved(state: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state dict on a device; tensors that share memory or are adjacent in memory still do and are.

    Raises ValueError for packed weights on another device than the CPU.
    """
    if (weights := precision_of(state)) is not None:
        if device.type != "cpu":
            raise ValueError(
                f"the weights are stored packed in {weights}, which is for a CPU, and the device is {device}: use the "
                "CPU, or the checkpoint that they were converted from"
            )
        return state
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
        if config.tie_word_embeddings and name in (EMBEDDING, HEAD):
            tied[name] = tensor
        elif len(parts := groups.get(name, ())) > 1:
            yield from zip(parts, tensor.split([shapes[part][0] for part in parts]), strict=True)
        else:
            yield name, tensor
    if tied:
        yield EMBEDDING, tied[HEAD if HEAD in tied else EMBEDDING]


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
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    one = embedding or head
    if one is not None and (head is None or embedding is None):
        tensors[HEAD] = tensors[EMBEDDING] = one
        return "tied, stored once"
    if head is None or embedding is None or (embedding.shape, embedding.dtype) != (head.shape, head.dtype):
        return "tied, but one of the two does not fit"
    same = all(torch.equal(*pieces) for pieces in zip(embedding.chunks(), head.chunks(), strict=True))
    if not same:
        notices.append(
            f"the configuration ties {HEAD} to {EMBEDDING} but the stored tensors differ; {HEAD} is used for both"
        )
    tensors[EMBEDDING] = head
    return f"tied, stored twice, {'equal' if same else 'not equal'}"
