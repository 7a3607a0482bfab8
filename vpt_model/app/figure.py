"""The demo's picture: the photo with its grid, one region at both looks, and the two procedures' time lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vpt_model.app.demo import STAGES, Comparison, Report, Run
from vpt_model.config import PRESETS
from vpt_model.engine.events import Box
from vpt_model.published.encoders import first_resize, smart_resize
from vpt_model.text.tokens import GRID, RegionSpan

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for what both procedures must do.
COLOURS = dict(zip(STAGES, ("#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#009E73", "#B8B8B8")))
DARK = {"prefill", "append"}
INK, MUTED, MARK = "#222222", "#6B6B6B", "#F0E442"


def draw(report: Report, path: str | Path) -> None:
    """Write the report's picture to `path` as PNG. Raises ValueError if it cannot be written."""
    shown = next((look for look in report.comparisons if look.boxes), None)
    style: dict[str, Any] = {"font.size": 10, "text.color": INK, "axes.edgecolor": MUTED, "axes.titlesize": 11}
    with rc_context(style):
        # Inches, because text keeps its size whatever the number of bars.
        height = 6.95 + 1.0 * len(report.comparisons)
        figure = Figure(figsize=(15, height), dpi=130, facecolor="white")
        upper: dict[str, float] = {"left": 0.03, "right": 0.985, "top": 1 - 1.05 / height, "bottom": 1 - 5.35 / height}
        lower = {"left": 0.115, "right": 0.985, "top": 1 - 6.05 / height, "bottom": 0.6 / height}
        grid = figure.add_gridspec(1, 3, wspace=0.05, **upper)
        panels = [figure.add_subplot(grid[0, column]) for column in range(3)]
        timeline = figure.add_subplot(figure.add_gridspec(1, 1, **lower)[0])
        _headline(figure, report)
        _photo(panels[0], report)
        resolution = PRESETS[report.preset].image_resolution
        whole = (0, 0, *report.image.size)
        _pixels(panels[1], report.image, None, shown.boxes[0] if shown else whole, resolution)
        if shown:
            _pixels(panels[2], report.image, shown.boxes[0], shown.boxes[0], resolution)
        else:
            panels[2].remove()
        _timeline(timeline, report.comparisons, report.overhead)
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error}; give another --out") from error


def seen_pixels(image: Image.Image, box: Box | None, resolution: int = 512) -> Image.Image:
    """What the vision tower gets of `image` or of its crop to `box`: NEAREST down to `resolution`, then BICUBIC."""
    reduced = first_resize(image if box is None else image.crop(box), resolution)
    height, width = smart_resize(reduced.height, reduced.width, 28)
    return reduced.resize((width, height), Image.Resampling.BICUBIC)


def richest_window(image: Image.Image, box: Box) -> Box:
    """The square, a seventh of the box's shorter side wide, in which neighbouring pixels differ most."""
    grey = np.asarray(image.crop(box).convert("L"), dtype=np.float32)
    side = max(min(grey.shape) // 7, 4)
    detail = np.abs(np.diff(grey, axis=0, prepend=grey[:1])) + np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
    corners = [
        (detail[y : y + side, x : x + side].sum(), x, y)
        for y in range(0, grey.shape[0] - side + 1, max(side // 4, 1))
        for x in range(0, grey.shape[1] - side + 1, max(side // 4, 1))
    ]
    _, x, y = max(corners)
    return box[0] + x, box[1] + y, box[0] + x + side, box[1] + y + side


def _headline(figure: Figure, report: Report) -> None:
    verdict = "identical ids" if all(look.identical for look in report.comparisons) else "DIFFERENT IDS"
    difference = max(look.difference for look in report.comparisons)
    height = figure.get_figheight()
    title = "Look, then look again"
    weights = "random weights"
    if report.story:
        first, weights = report.story[0], "trained weights"
        title = f"“{first.question.text}”  “{first.answer.text}” ({'right' if first.right else first.question.answer})"
    figure.text(0.03, 1 - 0.33 / height, title, fontsize=19, fontweight="bold", va="center")
    figure.text(
        0.03,
        1 - 0.68 / height,
        f"preset {report.preset}, {weights}  ·  {report.image.width}×{report.image.height} photo  ·  "
        f"against the published procedure: {verdict}, largest logit difference {difference:.1e}",
        fontsize=11,
        color=MUTED,
        va="center",
    )


def _photo(axes: Axes, report: Report) -> None:
    width, height = report.image.size
    axes.imshow(report.image)
    for index in range(1, GRID):
        axes.axvline(index * width / GRID, color="white", alpha=0.3, linewidth=0.7)
        axes.axhline(index * height / GRID, color="white", alpha=0.3, linewidth=0.7)
    for look in report.comparisons:
        for region, (left, top, right, bottom) in zip(look.regions, look.boxes):
            margin: dict[str, Any] = {"fill": False, "edgecolor": MARK, "linewidth": 1.4, "linestyle": (0, (4, 3))}
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, **margin))
            x0, y0, x1, y1 = _named_cells(region, width, height)
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=MARK, linewidth=2.4))
    axes.set_xticks([(index + 0.5) * width / GRID for index in range(GRID)], [f"x{index}" for index in range(GRID)])
    axes.set_yticks([(index + 0.5) * height / GRID for index in range(GRID)], [f"y{index}" for index in range(GRID)])
    axes.tick_params(length=0, labelsize=8.5, colors=MUTED, top=False, labeltop=False)
    named = any(look.boxes for look in report.comparisons)
    axes.set_title("The photo: named cells, and the crop with its margin" if named else "The photo", loc="left")


def _named_cells(region: RegionSpan, width: int, height: int) -> tuple[float, float, float, float]:
    return (
        min(region.columns) * width / GRID,
        min(region.rows) * height / GRID,
        (max(region.columns) + 1) * width / GRID,
        (max(region.rows) + 1) * height / GRID,
    )


def _pixels(axes: Axes, image: Image.Image, box: Box | None, view: Box, resolution: int) -> None:
    """The part `view` of what a look at `box` (None: the whole photo) gives the model, pixel by pixel, and a detail."""
    left, top, right, bottom = box or (0, 0, *image.size)
    pixels, extent = seen_pixels(image, box, resolution), (left, right, bottom, top)
    scale = pixels.width / (right - left)
    seen = f"{round((view[2] - view[0]) * scale)}×{round((view[3] - view[1]) * scale)} pixels"
    whole = view == (0, 0, *image.size)
    order = "First" if box is None else "Second"
    axes.set_title(f"{order} look: {seen} of {'the photo' if whole else 'this region'}", loc="left")

    detail = richest_window(image, view)
    right_half = detail[0] + detail[2] > view[0] + view[2]
    width, height = view[2] - view[0], view[3] - view[1]
    wide, high = 0.42 * min(width, height) / width, 0.42 * min(width, height) / height
    inset = axes.inset_axes((0.02 if right_half else 0.98 - wide, 0.02, wide, high))
    for axis, window in ((axes, view), (inset, detail)):
        axis.imshow(pixels, extent=extent, interpolation="nearest")
        axis.set(xlim=(window[0], window[2]), ylim=(window[3], window[1]), xticks=[], yticks=[])
    for spine in inset.spines.values():
        spine.set(color="white", linewidth=1.6)
    # The connectors of a flipped axis cross; the frame alone says enough.
    for connector in axes.indicate_inset_zoom(inset, edgecolor="white", alpha=0.9, linewidth=1.4).connectors or ():
        connector.set_visible(False)


def _timeline(axes: Axes, comparisons: list[Comparison], overhead: bool) -> None:
    end = max(run.total for look in comparisons for run in (look.ours, look.published))
    labels = []
    for index, look in enumerate(comparisons):
        for row, (name, run) in enumerate((("this engine", look.ours), ("published procedure", look.published))):
            y = 2.6 * index + row
            labels.append((y, name))
            _bar(axes, y, run, end)
            note = f"second look {_time(run.second_look)}"
            note += f", {look.speedup:.1f}× sooner" if run is look.ours else ""
            axes.plot([run.trigger_at, run.answer_at], [y + 0.36] * 2, color=INK, linewidth=2, solid_capstyle="butt")
            axes.text(run.total + 0.006 * end, y, f"{_time(run.total)} in all; {note}", va="center", fontsize=9.5)
        axes.text(0, 2.6 * index - 0.44, look.look, fontsize=10.5, fontweight="bold", va="bottom")
    unit, scale = ("seconds", 1e3) if end >= 1000 else ("milliseconds", 1)
    remark = "; the model is so small that most of it is Python's overhead" if overhead else ""
    axes.set(xlim=(0, 1.32 * end), ylim=(2.6 * len(comparisons) - 1.0, -0.95), xlabel=unit + remark)
    axes.xaxis.set_major_formatter(lambda milliseconds, _: f"{milliseconds / scale:g}")
    axes.set_yticks([y for y, _ in labels], [name for _, name in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles: list[Any] = [axes.barh(0, 0, color=COLOURS[name], label=name) for name in STAGES]
    handles.append(axes.barh(0, 0, color="white", edgecolor=COLOURS["decode"], label="between the stages"))
    handles += axes.plot([], [], color=INK, linewidth=2, label="from the perception token to the first answer token")
    axes.legend(
        handles=handles, ncols=len(handles), loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, fontsize=9.5
    )


def _bar(axes: Axes, y: float, run: Run, end: float) -> None:
    start = 0.0
    for step in run.steps:
        axes.barh(
            y, step.milliseconds, left=start, height=0.56, color=COLOURS[step.name], edgecolor="white", linewidth=0.8
        )
        if step.milliseconds > 0.052 * end:
            colour = "white" if step.name in DARK else INK
            middle = start + step.milliseconds / 2
            axes.text(middle, y, _time(step.milliseconds), ha="center", va="center", fontsize=8.5, color=colour)
        start += step.milliseconds
    axes.barh(
        y, max(run.total - start, 0), left=start, height=0.56, color="white", edgecolor=COLOURS["decode"], linewidth=0.8
    )


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"
