"""The model card of trained weights: `python -m examples.mini.card OUT EVALUATION.json > README.md`.

OUT is the training's folder, EVALUATION.json what `vpt eval-mini --json` printed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from vpt_model.mini.scenes import PHOTOS, SYMBOLS, fingerprint

_HEAD = """# vpt-mini

A vision-language model of {parameters:,} parameters that looks twice. It has the architecture, the token vocabulary and
the checkpoint layout of the released VPT models (arXiv 2502.17425, variant clip), small: an image, or a crop of it, is
reduced to 112 pixels, 8×8 patches, 16 visual tokens. It knows one task and nothing else; it exists so that a second
look can be seen to matter, and as a regression test with trained numbers.

## Task

Pictures of 298×298 pixels: three to five objects (six colours × four shapes) on a photograph, each with a tag of two
characters out of `{symbols}`. In the first look a tag is 12×7 pixels; its characters are four high and
have lost five of eight rows and columns. The crop of the 3×3 cells around an object keeps every pixel.

| kind | question | path |
|---|---|---|
| tag | What is on the tag of the red circle? | region |
| two tags | What is on the tags of the red circle and the blue square? | two regions |
| attribute | What colour is the circle? What shape is the red object? | none |
| count | How many objects are red? | re-encoding ("clip") |

## Data

Drawn on photographs that scikit-image ships by `vpt_model/mini/scenes.py`, SHA-256 without its imports
`{fingerprint}`.

- Training: {train}. {scenes:,} scenes, each drawn once.
- Test: {test}. No photograph and no scene of the test split was seen in training.

## Training

    python -m examples.mini.train --out build/mini

From random weights on one thread of an AMD EPYC (AVX-512, bfloat16), without interruption, beside other work on the
other core: {minutes:.0f} minutes of computing time, 24 by the clock, {steps:,} steps of 16 scenes, seed 0. Curriculum
and hints: `examples/mini/README.md`. Records and evaluations, of the controls too: `bench/results/vpt-mini/`.

## Accuracy

`vpt eval-mini`, {count:,} test pictures per line, float16 weights as shipped, computed in the dtype named. Paths:
"free" leaves the choice to the model, "always look" and "direct" ask for theirs in the question (an attribute's
question then gets the re-encoding that it does not need). Control states of the re-encoding: its own; zero, k = 0;
that of another question about another picture. "same tokens": the whole answer, token by token, as in the first
backend and dtype. "read the crop": the crop is the only picture, which training showed in its first third only.

| backend | dtype | question | path | control state | right | right path | same tokens |
|---|---|---|---|---|---|---|---|
"""


def card(out: Path, lines: list[dict], parameters: int) -> str:
    """The card's text up to its table; limits are written by hand."""
    last = torch.load(out / "checkpoint.pt", weights_only=True)
    names = {split: ", ".join(Path(name).stem for name in photos) for split, photos in PHOTOS.items()}
    text = _HEAD.format(
        parameters=parameters,
        symbols=SYMBOLS,
        fingerprint=fingerprint(),
        scenes=last["step"] * 16,
        steps=last["step"],
        minutes=last["elapsed"] / 60,
        count=lines[0]["score"]["count"],
        **names,
    )
    return text + table(lines)


def table(lines: list[dict]) -> str:
    """One row a line of the evaluation."""
    text = ""
    for line in lines:
        shares = (line["score"]["right"], line["score"]["right_path"], line["agreement"])
        shown = " | ".join("" if share is None else f"{100 * share:.1f} %" for share in shares)
        cells = (line["backend"], line["dtype"], line["kind"], line["path"], line["control"], shown)
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    from vpt_model.config import PRESETS
    from vpt_model.published.verify import parameter_counts

    folder, evaluation = sys.argv[1:]
    counts = parameter_counts(PRESETS["mini"])
    print(card(Path(folder), json.loads(Path(evaluation).read_text()), counts["total"]), end="")
