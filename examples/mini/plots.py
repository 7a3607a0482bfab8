"""The training's curves: loss, and accuracy by kind of conversation."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure


def draw_curves(folder: Path) -> None:
    """Draw `log.jsonl` of the folder as `curves.png`."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if not lines:
        return
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    loss, answers, looks = figure.subplots(3, 1, sharex=True)
    loss.plot([line["minutes"] for line in lines], [line["loss"] for line in lines], color="#222222")
    loss.set(ylabel="loss", yscale="log")
    for axis in (answers, looks):
        axis.set_prop_cycle(color=colormaps["tab20"].colors)
    kinds = sorted({kind for line in lines for kind in line["accuracy"]})
    for kind in kinds:
        axis = looks if kind.endswith("→look") else answers
        points = [(line["minutes"], line["accuracy"][kind]) for line in lines if kind in line["accuracy"]]
        axis.plot(*zip(*points), label=kind.removesuffix("→look"), linewidth=1)
    answers.set(ylabel="whole answer right", ylim=(0, 1))
    looks.set(ylabel="first round right", ylim=(0, 1), xlabel="computing time, minutes")
    for axis in (axis for axis in (answers, looks) if axis.lines):
        axis.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (loss, answers, looks):
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png")
