"""Our operators live here as definitions and workloads in the FlashInfer Trace schema, for other people's kernels to be
compared; it may import workloads.

    python -m bench traces DIR

writes definitions/*.json (axes, inputs, outputs and a stand-alone reference in PyTorch), workloads/*.jsonl and the
index tensors that a random input could not stand for. Schema: https://bench.flashinfer.ai/docs/flashinfer-trace.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.workloads import DOCUMENT, LARGE, LMS, MEGAPIXEL, PHOTO
from vpt_kernels import plan_regions, qwen2_vl_policy

HERE = Path(__file__).parent
TABLE_ROWS, CAPACITY = 8192, 8192
PATCH, EMBED = 14, 1280


@dataclass(frozen=True)
class Definition:
    """One operator at fixed widths.

    axes: an integer is constant, None varies. inputs, outputs: name → (axes, dtype). workloads: sizes of the varying
    axes, and the index tensors among the inputs; all others are random.
    """

    op: str
    name: str
    description: str
    axes: dict[str, int | None]
    inputs: dict[str, tuple[tuple[str, ...], str]]
    outputs: dict[str, tuple[tuple[str, ...], str]]
    workloads: tuple[tuple[dict[str, int], dict[str, Tensor]], ...]

    @property
    def reference(self) -> str:
        return (HERE / f"{self.op}.py").read_text()

    def as_dict(self) -> dict[str, Any]:
        def tensors(of: dict[str, tuple[tuple[str, ...], str]]) -> dict[str, Any]:
            return {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in of.items()}

        axes = {
            name: {"type": "var"} if size is None else {"type": "const", "value": size}
            for name, size in self.axes.items()
        }
        return {
            "name": self.name,
            "op_type": self.op,
            "description": self.description,
            "axes": axes,
            "inputs": tensors(self.inputs),
            "outputs": tensors(self.outputs),
            "reference": self.reference,
            "tags": ["vpt", "vision-language"],
        }


def append_definition(lm: str) -> Definition:
    """Define `append_visual_kv`, contiguous NHD, chunked sections (16, 24, 24)."""
    one = LMS[lm]
    rows = ("tokens", "kv_heads", "head_dim")
    cache = (("capacity", "kv_heads", "head_dim"), "bfloat16")

    def workload(tokens: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        start = CAPACITY - tokens
        # An image of nine columns after `start` tokens of text.
        cells = torch.stack([torch.zeros(tokens), torch.arange(tokens) // 9, torch.arange(tokens) % 9]).long()
        positions = (start // 2 + cells).clamp(max=TABLE_ROWS - 1)
        axes = {"tokens": tokens, "table_rows": TABLE_ROWS, "capacity": CAPACITY}
        return axes, {"positions": positions, "slots": torch.arange(start, CAPACITY)}

    return Definition(
        "append_visual_kv",
        f"append_visual_kv_h{one.heads}_kv{one.kv_heads}_d{one.head_dim}",
        "M-RoPE of q and k by three position rows, and append of k and v to a KV cache at given slots.",
        {
            "tokens": None,
            "table_rows": None,
            "capacity": None,
            "axes": 3,
            "q_heads": one.heads,
            "kv_heads": one.kv_heads,
            "head_dim": one.head_dim,
        },
        {
            "q": (("tokens", "q_heads", "head_dim"), "bfloat16"),
            "k": (rows, "bfloat16"),
            "v": (rows, "bfloat16"),
            "cos_sin": (("table_rows", "head_dim"), "float32"),
            "positions": (("axes", "tokens"), "int64"),
            "slots": (("tokens",), "int64"),
            "k_cache": cache,
            "v_cache": cache,
        },
        {"q_out": (("tokens", "q_heads", "head_dim"), "bfloat16"), "k_cache_out": cache, "v_cache_out": cache},
        tuple(workload(tokens) for tokens in (1, 54, 270, 4096)),
    )


def control_definition(lm: str) -> Definition:
    """Define `control_cross_attention`, linear form, ragged."""
    hidden, channels = LMS[lm].hidden, 1024

    def workload(*lengths: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return {"tokens": sum(lengths), "images": len(lengths), "ends": len(lengths) + 1}, {"cu_seqlens": ends}

    def vector(size: str) -> tuple[tuple[str, ...], str]:
        return (size,), "bfloat16"

    return Definition(
        "control_cross_attention",
        f"control_cross_attention_linear_h{hidden}_d{channels}",
        "Projector of re-encoded features conditioned on one control row an image: rank one, one key, no softmax.",
        {"tokens": None, "images": None, "ends": None, "hidden": hidden, "channels": channels},
        {
            "features": (("tokens", "channels"), "bfloat16"),
            "control": (("images", "hidden"), "bfloat16"),
            "cu_seqlens": (("ends",), "int64"),
            "feature_norm_weight": vector("channels"),
            "feature_norm_bias": vector("channels"),
            "feature_weight": (("hidden", "channels"), "bfloat16"),
            "feature_bias": vector("hidden"),
            "control_norm_weight": vector("hidden"),
            "control_norm_bias": vector("hidden"),
            "control_weight": (("hidden", "hidden"), "bfloat16"),
            "control_bias": vector("hidden"),
        },
        {"out": (("tokens", "hidden"), "bfloat16")},
        (workload(256), workload(*[256] * 16), workload(256, 0, 64, 252)),
    )


def roi_definition() -> Definition:
    """Define `roi_patch_embed` of one region by BICUBIC, horizontal pass first."""

    def workload(width: int, height: int, max_pixels: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        box = (0, 7, 3, width - 5, height - 11)
        ((rows, columns),) = plan_regions([(height, width)], [box], qwen2_vl_policy(max_pixels=max_pixels)).grids
        order = torch.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2).transpose(1, 2).flatten()
        given = {
            "box": torch.tensor(box[1:]),
            "size": torch.tensor([rows * PATCH, columns * PATCH]),
            "cells": torch.stack([order // columns, order % columns], 1),
        }
        return {"height": height, "width": width, "patches": rows * columns}, given

    return Definition(
        "roi_patch_embed",
        f"roi_patch_embed_p{PATCH}_e{EMBED}",
        "Crop, Pillow-exact resize and patch embedding of uint8 pixels, with normalisation folded into the weight.",
        {
            "height": None,
            "width": None,
            "patches": None,
            "channels": 3,
            "edges": 4,
            "sides": 2,
            "patch_bytes": 3 * PATCH * PATCH,
            "embed": EMBED,
        },
        {
            "image": (("height", "width", "channels"), "int8"),
            "box": (("edges",), "int64"),
            "size": (("sides",), "int64"),
            "cells": (("patches", "sides"), "int64"),
            "weight": (("embed", "patch_bytes"), "bfloat16"),
            "bias": (("embed",), "float32"),
        },
        {"tokens": (("patches", "embed"), "bfloat16")},
        (workload(*PHOTO, MEGAPIXEL), workload(*DOCUMENT, MEGAPIXEL // 4), workload(*LARGE, MEGAPIXEL)),
    )


def definitions() -> tuple[Definition, ...]:
    return (*map(append_definition, LMS), *map(control_definition, LMS), roi_definition())


def _lines(definition: Definition, folder: Path) -> Iterator[str]:
    blobs = Path("blob") / f"{definition.name}.safetensors"
    kept: dict[str, Tensor] = {}
    for number, (axes, given) in enumerate(definition.workloads):
        kept |= {f"{number}.{name}": tensor.contiguous() for name, tensor in given.items()}
        inputs = {
            name: {"type": "safetensors", "path": str(blobs), "tensor_key": f"{number}.{name}"}
            if name in given
            else {"type": "random"}
            for name in definition.inputs
        }
        key = uuid.uuid5(uuid.NAMESPACE_URL, f"{definition.name} {sorted(axes.items())}")
        workload = {"uuid": str(key), "axes": axes, "inputs": inputs}
        yield json.dumps({"definition": definition.name, "workload": workload})
    (folder / blobs).parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / blobs)


def write(folder: Path) -> list[Path]:
    """Return the trace set under `folder`; returns its definitions' files."""
    written = []
    for definition in definitions():
        path = folder / "definitions" / definition.op / f"{definition.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(definition.as_dict(), indent=1) + "\n")
        lines = folder / "workloads" / definition.op / f"{definition.name}.jsonl"
        lines.parent.mkdir(parents=True, exist_ok=True)
        lines.write_text("\n".join(_lines(definition, folder)) + "\n")
        written.append(path)
    return written
