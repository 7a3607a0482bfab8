"""What the engine core must know of a checkpoint to plan its looks; no weight is read and nothing is computed here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vpt_kernels import RegionPolicy, plan_regions, qwen2_vl_policy
from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.hub import model_folder
from vpt_model.checkpoint.weights import read_json
from vpt_model.config import ENCODERS, ModelConfig, parse_config
from vpt_model.network.encoders import build_encoder
from vpt_model.text.tokens import Tokenizer, crop_box, parse_region_ids

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom exclusive."""


@lru_cache(maxsize=4)
def checkpoint_config(model: str, revision: str | None = None) -> ModelConfig:
    """Return the configuration of a folder or a hub model, with the re-encoder that its files or tensors show."""
    folder = model_folder(f"{model}@{revision}" if revision and not Path(model).is_dir() else model)
    fields = read_json(folder / "config.json")
    return parse_config(fields) if fields.get("vision_encoder_ls") else Checkpoint.open(folder).config


def look_policy(config: ModelConfig) -> RegionPolicy:
    """Return how an image or a crop becomes patches: as published, with Pillow's pass order of that time."""
    return qwen2_vl_policy(
        longest_edge=config.image_resolution,
        patch_size=config.vision.patch_size,
        merge_size=config.vision.spatial_merge_size,
        pass_order="hv",
    )


def image_grid(config: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) in patches of an image or crop of that size. Raises ValueError if it cannot be resized."""
    (grid,) = plan_regions([(height, width)], [(0, 0, 0, width, height)], look_policy(config)).grids
    return int(grid[0]), int(grid[1])


def image_tokens(config: ModelConfig, height: int, width: int) -> int:
    """Return how many visual tokens an image or a crop of that size has."""
    rows, columns = image_grid(config, height, width)
    return rows * columns // config.vision.spatial_merge_size**2


def reencoded_tokens(config: ModelConfig, height: int, width: int) -> int:
    """Return how many visual tokens an image of that size has when it is encoded again."""
    return image_tokens(config, height, width) if config.kind == "clip" else _encoder_tokens(config)


@lru_cache(maxsize=4)
def _encoder_tokens(config: ModelConfig) -> int:
    return build_encoder(str(config.kind), config).tokens


@dataclass(frozen=True)
class Perception:
    """A checkpoint's shapes and vocabulary."""

    config: ModelConfig
    tokenizer: Tokenizer

    @property
    def encoder(self) -> str:
        """The re-encoder's name: "clip", "dino" or "sam"; "" where the vocabulary has no tokens of looks."""
        if self.tokenizer.is_aligned_only:
            return ""
        return next(name for name, kind in ENCODERS.items() if kind == self.config.kind)

    def boxes(self, height: int, width: int, turn: list[int]) -> tuple[Box, ...]:
        """Return the pixels of the regions that a turn names.

        Raises ValueError for a region that has none, or that is too narrow to be resized, even if the image is not.
        """
        boxes = tuple(crop_box(span, width, height) for span in parse_region_ids(turn, self.tokenizer.ids))
        for left, top, right, bottom in boxes:
            image_grid(self.config, bottom - top, right - left)
        return boxes


def perception_of(model_config: Any) -> Perception:
    """Return what the engine core knows of the checkpoint that vLLM's model configuration names."""
    config = checkpoint_config(model_config.model, model_config.revision)
    return Perception(config, Tokenizer.from_folder(model_folder(model_config.tokenizer), config.kind))
