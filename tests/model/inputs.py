"""Small models, images and golden data for the tests of vpt_model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vpt_model.checkpoint import random_state
from vpt_model.config import PRESETS, ModelConfig
from vpt_model.network.cache import KVCache
from vpt_model.network.language import LanguageModel
from vpt_model.network.model import Model
from vpt_model.published.recordings import Recording, load_recording
from vpt_model.text.tokens import TokenIds

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def tiny_config(kind: str | None = "clip") -> ModelConfig:
    return replace(PRESETS["tiny"], kind=kind)


@lru_cache(maxsize=4)
def tiny_state(kind: str | None = "clip", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 state dict of the tiny preset; shared between tests, so do not write to it."""
    return random_state(tiny_config(kind), seed)


@lru_cache(maxsize=4)
def tiny_model(kind: str | None = "clip", seed: int = 0, **other: Any) -> Model:
    """other: fields of the configuration that differ."""
    return Model.from_state(replace(tiny_config(kind), **other), tiny_state(kind, seed))


def appended(
    language: LanguageModel,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    caches: Sequence[KVCache],
    lengths: Sequence[int],
) -> torch.Tensor:
    """Hidden states of tokens that are fed and then count as stored, as `vpt_model.engine.executor` does it."""
    hidden = language.forward(embeds, positions, caches, lengths)
    for cache, count, where in zip(caches, lengths, positions.split(list(lengths), dim=1), strict=True):
        if count:
            cache.advance(count, int(where.max()) + 1)
    return hidden


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [height, width, 3]."""
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=5)
def recording(name: str) -> Recording:
    return load_recording(GOLDEN, name)


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of `tests/golden/<name>` (weights upcast to float32, integers to int64) and its sidecar."""
    return recording(name).tensors, recording(name).meta


def golden_config(name: str = "clip") -> ModelConfig:
    """The configuration in the sidecar of `name`."""
    return recording(name).config


def golden_state(name: str = "clip") -> dict[str, torch.Tensor]:
    """State dict of the golden model (checkpoint names, float32)."""
    return recording(name).state


def golden_again(name: str, row: int = 0) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Pixel values of the image that the recorded model re-encodes in `row`, and its grid if the tower does it."""
    return recording(name).reencoded_pixels(row)


def golden_token_ids(name: str = "clip") -> TokenIds:
    """Token ids of the golden model of `name`; no token ends generation, as in the recorded runs."""
    return recording(name).ids
