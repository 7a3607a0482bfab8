"""What the model was shown, for people to see: pixels and patches as they were fed, and what conditioned them.

The demo, `vpt ask --draw` and the page draw from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from torch import Tensor

from vpt_kernels import RegionPolicy, plan_regions, roi_patches
from vpt_model.engine import perception
from vpt_model.engine.events import Answer, Box, Look
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import Output, ReencodeAndAppend, Request
from vpt_model.network.model import Model
from vpt_model.text.tokens import GRID, RegionSpan, parse_regions

STAGES = ("crop+embed", "ViT", "prefill", "perceive", "append", "decode")
# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for what every procedure must do.
COLOURS = dict(zip(STAGES, ("#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#009E73", "#B8B8B8")))
STRONGER, WEAKER = (213, 94, 0), (0, 114, 178)
"""RGB of tokens with a > 0, which the control state drew towards its key, and of those with a < 0."""


@dataclass(frozen=True)
class Seen:
    """One image as a tower was fed it: pixels uint8 [height, width, 3], of which `patch`² pixels make a patch and
    `merge`² patches a visual token."""

    pixels: np.ndarray
    patch: int
    merge: int

    @property
    def tokens(self) -> int:
        height, width, _ = self.pixels.shape
        return height * width // (self.patch * self.merge) ** 2


def fed(image: Tensor, box: Box | None, policy: RegionPolicy) -> Seen:
    """Return what a look at `box` of an image uint8 [height, width, 3] gives the tower, to the bit; None: at the whole
    image.
    """
    height, width, _ = image.shape
    plan = plan_regions([(height, width)], [(0, *(box or (0, 0, width, height)))], policy)
    p, m, (rows, columns) = plan.patch_size, policy.merge_size, plan.grids[0]
    patches = roi_patches([image], plan).cpu().numpy()
    blocks = patches.reshape(rows // m, columns // m, m, m, p, p, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return Seen(blocks.reshape(rows * p, columns * p, 3), p, m)


def reencoded(model: Model, image: Tensor, policy: RegionPolicy) -> Seen:
    """Return what the re-encoder is fed of an image; policy: the vision tower's, which is the re-encoder of "clip"."""
    if model.encoder is None:
        return fed(image, None, policy)
    seen = fed(image, None, model.encoder.policy)
    return Seen(seen.pixels, seen.patch, isqrt(model.encoder.grid[0] * model.encoder.grid[1] // model.encoder.tokens))


def named_cells(region: RegionSpan, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the cells that a region names, without the margin of its crop: (left, top, right, bottom) in pixels."""
    return (
        min(region.columns) * width / GRID,
        min(region.rows) * height / GRID,
        (max(region.columns) + 1) * width / GRID,
        (max(region.rows) + 1) * height / GRID,
    )


def regions_of(answer: Answer) -> list[RegionSpan]:
    """Return the regions that the first round of an answer names, of which each names a column and a row."""
    return [region for region in parse_regions(answer.first_text) if region.columns and region.rows]


@dataclass(frozen=True)
class Sight:
    """One look of an answer for people to see.

    seen: each image as it was fed. cells: what each region names. map: how strongly each token of a re-encoding was
    conditioned, float32 [rows, columns].
    """

    look: Look
    seen: tuple[Seen, ...]
    cells: tuple[tuple[float, float, float, float], ...] = ()
    map: np.ndarray | None = None


def sights(
    model: Model, policy: RegionPolicy, image: Tensor, answer: Answer, scores: Sequence[Tensor] = ()
) -> list[Sight]:
    """Return all looks of an answer about an image; scores: of its re-encodings, as `Watched` took them."""
    height, width, _ = image.shape
    regions, left = iter(regions_of(answer)), iter(scores)
    shown = []
    for look in answer.looks:
        if look.kind == "region":
            cells = tuple(named_cells(region, width, height) for region, _ in zip(regions, look.boxes))
            shown.append(Sight(look, tuple(fed(image, box, policy) for box in look.boxes), cells))
        else:
            score = next(left, None)
            map_ = None if score is None else conditioning_map(score, look)
            shown.append(Sight(look, (reencoded(model, image, policy),), map=map_))
    return shown


class Watched:
    """An executor that also keeps how strongly each token of every re-encoding was conditioned.

    scores: float32 [tokens] of each re-encoding since they were last taken.
    """

    def __init__(self, model: Model, executor: Executor) -> None:
        self.model, self.executor = model, executor
        self.scores: list[Tensor] = []

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        results = self.executor.run(requests)
        for result in results:
            if not isinstance(result, ReencodeAndAppend) or result.features is None or result.control is None:
                continue
            self.scores.append(perception.conditioning(self.model, result.features, result.control).cpu())
        return results

    def take(self) -> list[Tensor]:
        taken, self.scores = self.scores, []
        return taken


def conditioning_map(scores: Tensor, look: Look) -> np.ndarray:
    """Return the scores of a re-encoding as they lie in the picture, float32 [rows, columns]."""
    height, width = look.grids[0]
    merge = isqrt(height * width // len(scores))
    return scores.view(height // merge, width // merge).numpy()


def tinted(scores: np.ndarray) -> np.ndarray:
    """Return the map as uint8 [rows, columns, 4]: colour by sign, opacity by size relative to the largest."""
    size = np.abs(scores) / max(float(np.abs(scores).max()), np.finfo(np.float32).tiny)
    colours = np.where((scores > 0)[..., None], np.array(STRONGER), np.array(WEAKER))
    return np.dstack([colours, np.round(190 * size)]).astype(np.uint8)


def answer_as_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as plain values; boxes are in pixels, times in milliseconds."""
    return {
        "text": answer.text,
        "ids": answer.ids,
        "first_text": answer.first_text,
        "finish_reason": answer.finish_reason,
        "notices": answer.notices,
        "looks": [
            {"kind": look.kind, "boxes": look.boxes, "tokens": look.tokens, "appended": look.appended}
            for look in answer.looks
        ],
        "stages": [
            {"stage": stage.name, "milliseconds": stage.milliseconds, "work": stage.work} for stage in answer.timings
        ],
    }
