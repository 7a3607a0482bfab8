"""Pictures as files: what the demo found, and one answer with all that it looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vpt_kernels import qwen2_vl_policy
from vpt_model.app.demo import Report, Run, Step
from vpt_model.app.seen import COLOURS, Seen, Sight, fed, named_cells, tinted
from vpt_model.config import PRESETS
from vpt_model.engine.events import Answer, Box, Stage
from vpt_model.text.tokens import GRID

DARK = {"prefill", "append"}
INK, MUTED, MARK = "#222222", "#6B6B6B", "#F0E442"
Cells = tuple[float, float, float, float]


@dataclass(frozen=True)
class Bar:
    """One line of the timeline. note: behind its end. mark: from the perception token to the first answer token."""

    label: str
    stages: Sequence[Step | Stage]
    total: float
    note: str = ""
    mark: tuple[float, float] | None = None


def draw(report: Report, path: str | Path) -> None:
    """Write the report's picture to `path` as PNG. Raises ValueError if it cannot be written."""
    shown = next((look for look in report.comparisons if look.boxes), None)
    image = np.asarray(report.image)
    whole = (0, 0, *report.image.size)
    view, policy = shown.boxes[0] if shown else whole, qwen2_vl_policy(longest_edge=_resolution(report))
    marks = [
        (named_cells(region, *report.image.size), box)
        for look in report.comparisons
        for region, box in zip(look.regions, look.boxes)
    ]
    groups = [(look.look, _bars(look.ours, look.published, look.speedup)) for look in report.comparisons]
    remark = "; the model is so small that most of it is Python's overhead" if report.overhead else ""
    with _figure(_headline(report), _subtitle(report), len(groups), 2) as (figure, panels, timeline):
        _photo(panels[0], image, marks)
        pixels = torch.from_numpy(image.copy())
        _pixels(panels[1], image, whole, fed(pixels, None, policy), view)
        if shown:
            _pixels(panels[2], image, view, fed(pixels, view, policy), view)
        else:
            panels[2].remove()
        _timeline(timeline, groups, remark)
        _save(figure, path)


def draw_answer(
    image: np.ndarray, question: str, answer: Answer, sights: Sequence[Sight], path: str | Path | BytesIO
) -> None:
    """Write one answer to `path` as PNG: the picture with its boxes, what was seen of it, and the time of each stage.

    image: uint8 [height, width, 3]. sights: the answer's looks, of which the first two images are shown. Raises
    ValueError if it cannot be written.
    """
    looks = ", then ".join(f"{sight.look.kind}, {sight.look.tokens} visual tokens" for sight in sights)
    title = f"“{_short(question, 60)}”  “{_short(answer.text, 40)}”"
    subtitle = f"{image.shape[1]}×{image.shape[0]} pixels  ·  {f'looked again: {looks}' if looks else 'one look'}"
    total = sum(stage.milliseconds for stage in answer.timings)
    marks = [pair for sight in sights for pair in zip(sight.cells, sight.look.boxes)]
    shown = [(sight, index) for sight in sights for index in range(len(sight.seen))][:2]
    with _figure(title, subtitle, 1, 1) as (figure, panels, timeline):
        _photo(panels[0], image, marks)
        for axes, (sight, index) in zip(panels[1:], shown):
            _seen(axes, sight, index)
        for axes in panels[1 + len(shown) :]:
            axes.remove()
        _timeline(timeline, [("", [Bar("this engine", answer.timings, total, f"{_time(total)} in all")])], "")
        _save(figure, path)


@contextmanager
def _figure(title: str, subtitle: str, groups: int, lines: int) -> Iterator[tuple[Figure, list[Axes], Axes]]:
    """Return a figure with its headline, three panels, and the timeline of `groups` times `lines` bars beneath them."""
    style: dict[str, Any] = {"font.size": 10, "text.color": INK, "axes.edgecolor": MUTED, "axes.titlesize": 11}
    with rc_context(style):
        # Inches, because text keeps its size whatever the number of bars.
        height = 6.95 + 0.5 * lines * groups
        figure = Figure(figsize=(15, height), dpi=130, facecolor="white")
        upper: dict[str, float] = {"left": 0.03, "right": 0.985, "top": 1 - 1.05 / height, "bottom": 1 - 5.35 / height}
        lower = {"left": 0.115, "right": 0.985, "top": 1 - 6.05 / height, "bottom": 0.6 / height}
        grid = figure.add_gridspec(1, 3, wspace=0.05, **upper)
        panels = [figure.add_subplot(grid[0, column]) for column in range(3)]
        timeline = figure.add_subplot(figure.add_gridspec(1, 1, **lower)[0])
        # A question may hold what matplotlib would read as mathematics.
        figure.text(0.03, 1 - 0.33 / height, title, fontsize=19, fontweight="bold", va="center", parse_math=False)
        figure.text(0.03, 1 - 0.68 / height, subtitle, fontsize=11, color=MUTED, va="center")
        yield figure, panels, timeline


def _save(figure: Figure, path: str | Path | BytesIO) -> None:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}; name a file in a folder that exists") from error


def richest_window(image: np.ndarray, box: Box) -> Box:
    """Return the square, a seventh of the box's shorter side wide, in which neighbouring pixels differ most."""
    left, top, right, bottom = box
    grey = np.asarray(Image.fromarray(image[top:bottom, left:right]).convert("L"), dtype=np.float32)
    side = max(min(grey.shape) // 7, 4)
    detail = np.abs(np.diff(grey, axis=0, prepend=grey[:1])) + np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
    corners = [
        (detail[y : y + side, x : x + side].sum(), x, y)
        for y in range(0, grey.shape[0] - side + 1, max(side // 4, 1))
        for x in range(0, grey.shape[1] - side + 1, max(side // 4, 1))
    ]
    _, x, y = max(corners)
    return left + x, top + y, left + x + side, top + y + side


def _resolution(report: Report) -> int:
    return PRESETS[report.preset].image_resolution


def _headline(report: Report) -> str:
    if not report.story:
        return "Look, then look again"
    first = report.story[0]
    return f"“{first.question.text}”  “{first.answer.text}” ({'right' if first.right else first.question.answer})"


def _subtitle(report: Report) -> str:
    verdict = "identical ids" if all(look.identical for look in report.comparisons) else "DIFFERENT IDS"
    difference = max(look.difference for look in report.comparisons)
    weights = "trained weights" if report.story else "random weights"
    return (
        f"preset {report.preset}, {weights}  ·  {report.image.width}×{report.image.height} photo  ·  "
        f"against the published procedure: {verdict}, largest logit difference {difference:.1e}"
    )


def _bars(ours: Run, published: Run, speedup: float) -> list[Bar]:
    bars = []
    for label, run in (("this engine", ours), ("published procedure", published)):
        note = f"{_time(run.total)} in all; second look {_time(run.second_look)}"
        note += f", {speedup:.1f}× sooner" if run is ours else ""
        bars.append(Bar(label, run.steps, run.total, note, (run.trigger_at, run.answer_at)))
    return bars


def _photo(axes: Axes, image: np.ndarray, marks: Sequence[tuple[Cells, Box]]) -> None:
    """Draw the picture under its grid. marks: named cells, and the crop around them."""
    height, width, _ = image.shape
    axes.imshow(image)
    for index in range(1, GRID):
        axes.axvline(index * width / GRID, color="white", alpha=0.3, linewidth=0.7)
        axes.axhline(index * height / GRID, color="white", alpha=0.3, linewidth=0.7)
    for (x0, y0, x1, y1), (left, top, right, bottom) in marks:
        margin: dict[str, Any] = {"fill": False, "edgecolor": MARK, "linewidth": 1.4, "linestyle": (0, (4, 3))}
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **margin))
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=MARK, linewidth=2.4))
    axes.set_xticks([(index + 0.5) * width / GRID for index in range(GRID)], [f"x{index}" for index in range(GRID)])
    axes.set_yticks([(index + 0.5) * height / GRID for index in range(GRID)], [f"y{index}" for index in range(GRID)])
    axes.tick_params(length=0, labelsize=8.5, colors=MUTED, top=False, labeltop=False)
    axes.set_title("The photo: named cells, and the crop with its margin" if marks else "The photo", loc="left")


def _pixels(axes: Axes, image: np.ndarray, box: Box, seen: Seen, view: Box) -> None:
    """Draw the part `view` of what a look at `box` gave the model, pixel by pixel, and a detail."""
    left, top, right, bottom = box
    extent = (left, right, bottom, top)
    scale = seen.pixels.shape[1] / (right - left)
    shown = f"{round((view[2] - view[0]) * scale)}×{round((view[3] - view[1]) * scale)} pixels"
    whole = (0, 0, image.shape[1], image.shape[0])
    order = "First" if box == whole else "Second"
    axes.set_title(f"{order} look: {shown} of {'the photo' if view == whole else 'this region'}", loc="left")

    detail = richest_window(image, view)
    right_half = detail[0] + detail[2] > view[0] + view[2]
    width, height = view[2] - view[0], view[3] - view[1]
    wide, high = 0.42 * min(width, height) / width, 0.42 * min(width, height) / height
    inset = axes.inset_axes((0.02 if right_half else 0.98 - wide, 0.02, wide, high))
    for axis, window in ((axes, view), (inset, detail)):
        axis.imshow(seen.pixels, extent=extent, interpolation="nearest")
        axis.set(xlim=(window[0], window[2]), ylim=(window[3], window[1]), xticks=[], yticks=[])
    for spine in inset.spines.values():
        spine.set(color="white", linewidth=1.6)
    # The connectors of a flipped axis cross; the frame alone says enough.
    for connector in axes.indicate_inset_zoom(inset, edgecolor="white", alpha=0.9, linewidth=1.4).connectors or ():
        connector.set_visible(False)


def _seen(axes: Axes, sight: Sight, index: int) -> None:
    """Draw an image as it was fed, with the borders of its visual tokens; a re-encoding has its map over it."""
    seen = sight.seen[index]
    height, width, _ = seen.pixels.shape
    extent = (0, width, height, 0)
    axes.imshow(seen.pixels, extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    step = seen.patch * seen.merge
    for at in range(step, width, step):
        axes.axvline(at, color="white", alpha=0.25, linewidth=0.6)
    for at in range(step, height, step):
        axes.axhline(at, color="white", alpha=0.25, linewidth=0.6)
    title = f"As it was fed: {width}×{height} pixels, {seen.tokens} tokens"
    if sight.map is not None:
        axes.imshow(tinted(sight.map), extent=extent, interpolation="nearest")
        title = f"Re-encoded ({sight.look.kind}), a = f·k from {sight.map.min():.3g} (blue) to {sight.map.max():.3g}"
    axes.set_title(title, loc="left")


def _timeline(axes: Axes, groups: Sequence[tuple[str, Sequence[Bar]]], remark: str) -> None:
    """Draw bars in groups under a title each; times are in milliseconds."""
    lines = max(len(bars) for _, bars in groups)
    end, step = max(bar.total for _, bars in groups for bar in bars), lines + 0.6
    labels = []
    for index, (title, bars) in enumerate(groups):
        for row, bar in enumerate(bars):
            y = step * index + row
            labels.append((y, bar.label))
            _bar(axes, y, bar, end)
            if bar.mark:
                axes.plot(bar.mark, [y + 0.36] * 2, color=INK, linewidth=2, solid_capstyle="butt")
            axes.text(bar.total + 0.006 * end, y, bar.note, va="center", fontsize=9.5)
        axes.text(0, step * index - 0.44, title, fontsize=10.5, fontweight="bold", va="bottom")
    unit, scale = ("seconds", 1e3) if end >= 1000 else ("milliseconds", 1)
    axes.set(xlim=(0, 1.32 * end), ylim=(step * len(groups) - 1.0, -0.95), xlabel=unit + remark)
    axes.xaxis.set_major_formatter(lambda milliseconds, _: f"{milliseconds / scale:g}")
    axes.set_yticks([y for y, _ in labels], [name for _, name in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles: list[Any] = [axes.barh(0, 0, color=colour, label=name) for name, colour in COLOURS.items()]
    every = [bar for _, bars in groups for bar in bars]
    if any(bar.total > sum(stage.milliseconds for stage in bar.stages) for bar in every):
        handles.append(axes.barh(0, 0, color="white", edgecolor=COLOURS["decode"], label="between the stages"))
    if any(bar.mark for bar in every):
        label = "from the perception token to the first answer token"
        handles += axes.plot([], [], color=INK, linewidth=2, label=label)
    axes.legend(
        handles=handles, ncols=len(handles), loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, fontsize=9.5
    )


def _bar(axes: Axes, y: float, bar: Bar, end: float) -> None:
    start = 0.0
    for stage in bar.stages:
        axes.barh(
            y, stage.milliseconds, left=start, height=0.56, color=COLOURS[stage.name], edgecolor="white", linewidth=0.8
        )
        if stage.milliseconds > 0.052 * end:
            colour = "white" if stage.name in DARK else INK
            middle = start + stage.milliseconds / 2
            axes.text(middle, y, _time(stage.milliseconds), ha="center", va="center", fontsize=8.5, color=colour)
        start += stage.milliseconds
    rest = max(bar.total - start, 0)
    axes.barh(y, rest, left=start, height=0.56, color="white", edgecolor=COLOURS["decode"], linewidth=0.8)


def _short(text: str, length: int) -> str:
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"
