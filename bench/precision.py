"""What keeping weights in fewer bits costs a model of the 2B's widths: `python -m bench.precision`.

One photo and a text go through the tower and the language model of `2b-slice`, once with float32 weights and caches and
once in each precision: the table has the error of all logits (relative to their standard deviation), how often the
argmax token is the same, how long its weights and cache are, and the milliseconds of each stage.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vpt_kernels import PackedWeight, qwen2_vl_policy
from vpt_model.app.demo import default_image
from vpt_model.checkpoint import random_state
from vpt_model.config import PRESETS
from vpt_model.network.model import Model
from vpt_model.network.state import PRECISIONS

PRESET, TEXT, DECODED = "2b-slice", 400, 8


@dataclass(frozen=True)
class Run:
    logits: Tensor
    nbytes: int
    tower: float
    prefill: float
    token: float


def run(weights: str | None) -> Run:
    """Return logits [T, vocab] of every position, and seconds."""
    config = PRESETS[PRESET]
    model = Model.from_state(config, random_state(config), weights, consume=True)
    image = torch.from_numpy(np.array(default_image()))
    box = (0, 0, 0, image.shape[1], image.shape[0])
    ids = torch.randint(0, config.vocab_size, (TEXT,), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        (features,), _ = model.vision.look([image], [box], qwen2_vl_policy(longest_edge=512))
        seen = time.perf_counter()
        embeds = torch.cat([model.language.embed(ids[: TEXT // 2]), features, model.language.embed(ids[TEXT // 2 :])])
        positions = torch.arange(len(embeds)).expand(3, -1)
        cache = model.language.new_cache(len(embeds) + DECODED)
        hidden = model.language.forward(embeds, positions, [cache], [len(embeds)])
        cache.advance(len(embeds), len(embeds))
        filled = time.perf_counter()
        found = [model.language.logits(hidden)]
        middle = time.perf_counter()
        for number in range(DECODED):
            at = len(embeds) + number
            one = model.language.forward(
                model.language.embed(ids[number : number + 1]), torch.full((3, 1), at), [cache], [1]
            )
            cache.advance(1, at + 1)
            found.append(model.language.logits(one))
        times.append((seen - begin, filled - seen, (time.perf_counter() - middle) / DECODED))
    return Run(torch.cat(found), _nbytes(model) + cache.nbytes, *map(min, zip(*times)))


def _nbytes(model: Model) -> int:
    language, vision = model.language, model.vision
    kept = [weight for layer in language.layers for weight in vars(layer).values()] + [language.head]
    kept += [part for block in vision.blocks for pair in vars(block).values() for part in pair]
    return sum(weight.nbytes for weight in kept if isinstance(weight, (Tensor, PackedWeight)))


@torch.inference_mode()
def main() -> None:
    exact = run(None)
    spread = exact.logits.std()
    print(f"| weights of {PRESET} | logits' error, rms / largest | same argmax token | GB | tower | prefill | token |")
    print("|---|---|---|---|---|---|---|")
    for weights in PRECISIONS[1:]:
        found = run(weights)
        error = (found.logits - exact.logits) / spread
        same = (found.logits.argmax(-1) == exact.logits.argmax(-1)).float().mean()
        milliseconds = " | ".join(f"{seconds * 1e3:.0f} ms" for seconds in (found.tower, found.prefill, found.token))
        print(
            f"| {weights} | {error.square().mean().sqrt():.1e} / {error.abs().max():.1e} | {same:.1%} "
            f"| {found.nbytes / 1e9:.2f} | {milliseconds} |"
        )


if __name__ == "__main__":
    main()
