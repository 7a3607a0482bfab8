"""Folders whose products' weights are stored as `packed_linear` reads them: which, under which names, in which shapes.

A packed weight is a few tensors, the panels and what belongs to them. Each is stored under the weight's name in a
converted checkpoint and its own in `PackedWeight`: `model.layers.0.self_attn.qkv_proj.weight.data`, `….scales`. So
nothing here knows of one precision more than its name. `config.json` says that a folder is packed, in which precision,
and by which version of the layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vpt_kernels import PackedWeight, pack_weight
from vpt_model.checkpoint.shapes import EMBEDDING, HEAD, expected_shapes, fused_groups
from vpt_model.checkpoint.weights import Maps, Stored
from vpt_model.config import ModelConfig

LAYOUT = 1
"""Rises with every change of the panels, so that nothing is read as what it is not."""
_WIDEST = 1 << 20
_FIELD, _METHOD = "quantization_config", "vpt_packed"
_PRODUCT = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(qkv|o)|mlp\.(gate_up|down))_proj\.weight|lm_head\.weight"
    r"|visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|merger\.mlp\.[02])\.weight"
)
_GATED = re.compile(r"model\.layers\.\d+\.mlp\.gate_up_proj\.weight")


def products(config: ModelConfig) -> dict[str, list[str]]:
    """Return what is stored packed, by its name in a converted checkpoint, and the tensors whose rows each holds.

    A tied embedding is the head. What a re-encoder multiplies by stays as it is, and is packed at loading.
    """
    return {
        name: parts
        for name, parts in fused_groups(config).items()
        if _PRODUCT.fullmatch(name) or (name == EMBEDDING and config.tie_word_embeddings)
    }


def is_gated(name: str) -> bool:
    """Return whether the first half of a product's rows is the gate of the second."""
    return _GATED.fullmatch(name) is not None


def tensors_of(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors that a packed weight consists of, under the names in which they are stored."""
    named = {f"{name}.{field.name}": getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def precision_of(state: Mapping[str, Any]) -> str | None:
    """Return the precision of the packed weights of a state dict, None where it has none."""
    found = next((one for one in state.values() if isinstance(one, PackedWeight)), None)
    return None if found is None else found.precision


def outlines(config: ModelConfig, weights: str) -> dict[str, PackedWeight]:
    """Return all `products` as packed in a precision, of which types and shapes are true and no number is.

    Raises ValueError for a precision that is unknown.
    """
    shapes = expected_shapes(config)
    return {
        name: _outline(sum(shapes[part][0] for part in parts), shapes[parts[0]][1], weights, is_gated(name))
        for name, parts in products(config).items()
    }


@lru_cache(maxsize=64)
def _outline(rows: int, columns: int, weights: str, gated: bool) -> PackedWeight:
    if columns > _WIDEST:
        raise ValueError(
            f"a product has {columns:,} columns; packed weights have at most {_WIDEST:,}: convert it unpacked"
        )
    # One panel tells the shapes of all, at no cost of memory whatever a file claims. Not on the meta device: its first
    # use imports a compiler, two seconds long.
    panel = pack_weight(torch.zeros(16, columns, dtype=torch.float32, device="cpu"), weights, gated=gated)
    features = rows // 2 if gated else rows
    panels = -(-features // panel.out_features)
    parts: dict[str, Any] = {
        name.removeprefix("."): one.expand(panels, *one.shape[1:]) for name, one in tensors_of("", panel).items()
    }
    return replace(panel, out_features=features, **parts)


def mapped(name: str, outline: PackedWeight, tensors: Mapping[str, Stored], maps: Maps) -> PackedWeight:
    """Return a packed weight in the pages of its file or, where they are not aligned, read from it."""
    found: dict[str, Any] = {}
    for full in tensors_of(name, outline):
        part = tensors[full]
        tensor = maps.tensor([part])
        if tensor is None:
            tensor = torch.empty(part.shape, dtype=part.dtype, device="cpu")
            part.read_into(tensor)
        found[full.removeprefix(f"{name}.")] = tensor.view(part.shape)
    return replace(outline, **found)


def wanted(config: ModelConfig, weights: str | None) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Return shape and dtype of every tensor of a folder packed in a precision, or not at all; None: the dtype that all
    others have.
    """
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]]
    shapes = {name: (shape, None) for name, shape in expected_shapes(config).items()}
    if weights is None:
        return shapes
    for part in (part for parts in products(config).values() for part in parts):
        del shapes[part]
    for name, outline in outlines(config, weights).items():
        shapes |= {full: (tuple(one.shape), one.dtype) for full, one in tensors_of(name, outline).items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def taken_apart(config: ModelConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with the tensors of its packed weights, under the names in which they are stored."""
    apart: dict[str, Any] = {}
    for name, one in state.items():
        if not isinstance(one, PackedWeight):
            apart[name] = one
        elif name != HEAD or not config.tie_word_embeddings:
            apart |= tensors_of(name, one)
    return apart


def declaration(weights: str) -> dict[str, Any]:
    """Return what `config.json` says of a packed folder."""
    return {_FIELD: {"quant_method": _METHOD, "weights": weights, "layout": LAYOUT}}


def declared(content: Mapping[str, Any]) -> str | None:
    """Return the precision in which a folder with this `config.json` is packed, None where it is not.

    Raises ValueError for a layout that this version does not read.
    """
    said = content.get(_FIELD)
    if not isinstance(said, Mapping) or said.get("quant_method") != _METHOD:
        return None
    if said.get("layout") != LAYOUT or not isinstance(said.get("weights"), str):
        raise ValueError(
            f"the packed weights are of layout {said.get('layout')!r} in {said.get('weights')!r}, and this version "
            f"reads layout {LAYOUT}: convert the checkpoint that they come from again"
        )
    return str(said["weights"])


def undeclared(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of the checkpoint that a packed folder was made of."""
    return {name: value for name, value in content.items() if name != _FIELD}
