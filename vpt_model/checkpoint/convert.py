"""`vpt convert`: a checkpoint as sharded safetensors whose tensors are the ones that the model uses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt_kernels import pack_weight
from vpt_model.checkpoint.draw import Progress
from vpt_model.checkpoint.load import Checkpoint
from vpt_model.checkpoint.packed import declaration, is_gated, outlines, tensors_of
from vpt_model.checkpoint.shapes import expected_shapes, fused_groups
from vpt_model.checkpoint.weights import Stored, Written, write_safetensors
from vpt_model.config import ENCODERS

SHARD_BYTES = 4_000_000_000

# What the weights need beside them, where the source has it.
_COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def convert(
    checkpoint: Checkpoint,
    target: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
    *,
    weights: str | None = None,
) -> Path:
    """Write `checkpoint` to the new folder `target`, in its own dtype unless another is given; returns the folder.

    weights: the precision in which products' weights are stored packed, so that a CPU reads them where they lie in the
    file (`packed`); everything else stays as it is.

    Names and fusion: `fused_groups`. Tied embeddings are stored once. Files are smaller than `shard_bytes` unless one
    tensor is larger. No more than one piece of a tensor is in memory at a time, or one product's weight that is being
    packed. The folder appears under its name when it is complete; after an interruption there is at most
    `<target>.incomplete`, which does not load.

    Raises ValueError, and leaves nothing behind, if `target` exists, if another conversion is writing to it, if the
    disk has no room, if `checkpoint` is packed itself, for an unknown precision, and for weights that it cannot hold.
    """
    if checkpoint.weights is not None:
        raise ValueError(
            f"{checkpoint.folder} is packed in {checkpoint.weights} already: convert the checkpoint that it was made of"
        )
    if dtype is not None and weights is not None:
        raise ValueError(f"dtype is {dtype} and weights is {weights!r}: give one of them, what is not packed stays")
    target = Path(target).absolute()
    if target.exists():
        raise ValueError(f"{target} exists: choose a new folder, or remove it first")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} to; make it first")
    dtype = dtype or next(iter(checkpoint.tensors.values())).dtype
    tensors = _tensors(checkpoint, dtype, weights)
    sizes = {name: one.nbytes for name, one in tensors.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(target.parent).free
    if total > free:
        raise ValueError(f"{target.parent} has {free:,} bytes free, the weights need {total:,}: make room first")

    unfinished = target.with_name(f"{target.name}.incomplete")
    try:
        unfinished.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{unfinished} exists: another conversion is writing it or was killed; remove it if none is running"
        ) from None
    try:
        done, weight_map, shards = 0, {}, _shards(sizes, shard_bytes)
        for index, names in enumerate(shards):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            for name in write_safetensors(unfinished / file, {name: tensors[name] for name in names}):
                weight_map[name] = file
                done += sizes[name]
                progress(done, total)
        if len(shards) > 1:
            _write_json(
                unfinished / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        for name in _COMPANIONS:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, unfinished / name)
        # Without this file nothing loads, so it is the last one.
        content = _declare(checkpoint.fields, str(dtype).removeprefix("torch."))
        content |= {} if weights is None else declaration(weights)
        if checkpoint.config.kind is not None:
            content["vision_encoder_ls"] = [name for name, kind in ENCODERS.items() if kind == checkpoint.config.kind]
        _write_json(unfinished / "config.json", content)
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        Checkpoint.open(unfinished)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def _tensors(checkpoint: Checkpoint, dtype: torch.dtype, weights: str | None) -> dict[str, Written]:
    """Return what is written, under its names; packed weights first, whose sizes keep what follows aligned."""
    shapes, stored = expected_shapes(checkpoint.config), checkpoint.tensors
    packed = {} if weights is None else outlines(checkpoint.config, weights)
    first, rest = dict[str, Written](), dict[str, Written]()
    for name, parts in fused_groups(checkpoint.config).items():
        found = [stored[part] for part in parts]
        if weights is not None and name in packed:
            packing = _Packing(name, found, weights)
            for full, outline in tensors_of(name, packed[name]).items():
                first[full] = Written(outline.dtype, tuple(outline.shape), partial(packing.chunks, full))
        else:
            shape = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
            rest[name] = Written(dtype, shape, partial(_cast, found, dtype))
    return first | rest


def _cast(parts: Sequence[Stored], dtype: torch.dtype) -> Iterator[Tensor]:
    for part in parts:
        for chunk in part.chunks():
            yield chunk.to(dtype)


class _Packing:
    """A product's weight, which is packed for the first of its tensors that is written and let go with the last."""

    def __init__(self, name: str, parts: Sequence[Stored], weights: str) -> None:
        self.name, self.parts, self.weights = name, parts, weights
        self._left: dict[str, Tensor] = {}

    def chunks(self, full: str) -> Iterator[Tensor]:
        if not self._left:
            rows = [torch.empty(part.shape, dtype=part.dtype, device="cpu") for part in self.parts]
            for part, place in zip(self.parts, rows, strict=True):
                part.read_into(place)
            try:
                weight = pack_weight(rows, self.weights, gated=is_gated(self.name))
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
            self._left = tensors_of(self.name, weight)
        yield self._left.pop(full)


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _declare(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the configuration with the dtype under each name that it has there, in sections too; `torch_dtype` if
    none.
    """
    named = [name for name in ("torch_dtype", "dtype") if name in fields] or ["torch_dtype"]
    content = {**fields, **dict.fromkeys(named, dtype)}
    for section in ("text_config", "vision_config"):
        inner = content.get(section) or {}
        if named := [name for name in ("torch_dtype", "dtype") if name in inner]:
            content[section] = {**inner, **dict.fromkeys(named, dtype)}
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
