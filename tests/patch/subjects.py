"""Modules whose layers are read instead of called: each with the names of those layers, and a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import normal
from tests.patch import foreign, published

GRIDS = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 2, 2]])
FEATURES = {"detection": (3, 5, 48), "seg": (3, 16, 8, 8), "clip": (11, published.HIDDEN)}

Subject = tuple[nn.Module, list[str], tuple[Any, ...]]
"""A module, the names of its layers whose weights are read, and a call."""


def embedding(kind: str) -> Subject:
    embed = foreign.qwen(kind).model.visual.patch_embed
    return embed, ["proj"], (normal(6, embed.proj.weight[0].numel(), key=kind),)


def encoder(kind: str) -> Subject:
    model, size = (foreign.dinov2(), 56) if kind == "dinov2" else (foreign.sam(), 64)
    return model.get_input_embeddings(), ["projection"], (normal(2, 3, size, size, key=kind),)


def projector(kind: str) -> Subject:
    module = foreign.filled(published.PROJECTORS[kind]())
    own = {"detection": ["layernorm_feature", "linear_feature"], "seg": ["layernorm_feature", "conv_feature"]}
    given = [normal(*FEATURES[kind], key="f"), normal(3, published.HIDDEN, key="c")]
    names = ["layernorm_condition", "linear_condition", *own.get(kind, [])]
    return module, names, (*given, *([False, GRIDS] if kind == "clip" else []))


SUBJECTS = dict.fromkeys(foreign.QWEN, embedding) | {"dinov2": encoder, "sam": encoder}
SUBJECTS |= dict.fromkeys(published.PROJECTORS, projector)
RUN = {nn.Conv2d: "conv2d", nn.Conv3d: "conv3d", nn.Linear: "linear", nn.LayerNorm: "layer_norm"}


def run(module: nn.Module, given: tuple[Any, ...]) -> Tensor:
    out = module(*given)
    return out[0] if isinstance(out, tuple) else out
