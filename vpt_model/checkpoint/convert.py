"""`vpt convert`: a checkpoint as sharded safetensors whose tensors are the ones that the model uses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vpt_model.checkpoint.draw import Progress
from vpt_model.checkpoint.load import Checkpoint
from vpt_model.checkpoint.shapes import expected_shapes, fused_groups
from vpt_model.checkpoint.weights import Stored, write_safetensors
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
) -> Path:
    """Write `checkpoint` to the new folder `target`, in its own dtype unless another is given; returns the folder.

    Names and fusion: `fused_groups`. Tied embeddings are stored once. Files are smaller than `shard_bytes` unless one
    tensor is larger. No more than one piece of a tensor is in memory at a time. The folder appears under its name when
    it is complete; after an interruption there is at most `<target>.incomplete`, which does not load.

    Raises ValueError, and leaves nothing behind, if `target` exists, if another conversion is writing to it, or if the
    disk has no room.
    """
    target = Path(target).absolute()
    if target.exists():
        raise ValueError(f"{target} exists: choose a new folder, or remove it first")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} to; make it first")
    shapes, stored = expected_shapes(checkpoint.config), checkpoint.tensors
    dtype = dtype or next(iter(stored.values())).dtype
    tensors: dict[str, tuple[tuple[int, ...], list[Stored]]] = {}
    for name, parts in fused_groups(checkpoint.config).items():
        rows = sum(shapes[part][0] for part in parts)
        tensors[name] = (rows, *shapes[parts[0]][1:]), [stored[part] for part in parts]
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, _) in tensors.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(target.parent).free
    if total > free:
        raise ValueError(f"{target.parent} has {free:,} bytes free, the weights need {total:,}: make room first")

    partial = target.with_name(f"{target.name}.incomplete")
    try:
        partial.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{partial} exists: another conversion is writing it or was killed; remove it if none is running"
        ) from None
    try:
        done, weight_map, shards = 0, {}, _shards(sizes, shard_bytes)
        for index, names in enumerate(shards):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            for name in write_safetensors(partial / file, {name: tensors[name] for name in names}, dtype):
                weight_map[name] = file
                done += sizes[name]
                progress(done, total)
        if len(shards) > 1:
            _write_json(
                partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        for name in _COMPANIONS:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, partial / name)
        # Without this file nothing loads, so it is the last one.
        content = _declare(checkpoint.fields, str(dtype).removeprefix("torch."))
        if checkpoint.config.kind is not None:
            content["vision_encoder_ls"] = [name for name, kind in ENCODERS.items() if kind == checkpoint.config.kind]
        _write_json(partial / "config.json", content)
        for path in (*partial.iterdir(), partial):
            _flush(path)
        Checkpoint.open(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


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
