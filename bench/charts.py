"""The pictures of `python -m bench report`: ratio bars, roofline, and what the second look costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from bench.report import Result, is_ceiling, strongest  # noqa: E402

OURS, THEIRS, CEILING, INK = "#0072b2", "#999999", "#e69f00", "#222222"
MARKERS = {"roi_patch_embed": "o", "roi_patches": "s", "control_cross_attention": "^", "append_visual_kv": "D"}
COLOURS = {
    "roi_patch_embed": "#0072b2",
    "roi_patches": "#56b4e9",
    "control_cross_attention": "#cc79a7",
    "append_visual_kv": "#009e73",
}


def _timed(result: Result) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "wrong" not in row and strongest(row)[0]]


def _where(result: Result) -> str:
    e = result["environment"]
    return f"{e.get('gpu') or e['cpu']}, {e['threads']} CPU threads, torch {e['torch']}, {e['date'][:10]}"


def ratio_bars(result: Result, path: Path) -> None:
    """How many times as fast as each alternative, one group of bars a row; the line at 1 is "equal"."""
    bars: list[tuple[str, str, float, float, float]] = []
    for row in _timed(result):
        for name, other in row["alternatives"].items():
            if "absent" not in other and not is_ceiling(name):
                bars.append((row["name"].replace(" |", ","), name, other["ratio"], other["low"], other["high"]))
    figure, axes = plt.subplots(figsize=(11, 0.27 * len(bars) + 1.6))
    previous = None
    for y, (row, name, ratio, low, high) in enumerate(bars):
        colour = OURS if ratio >= 1 else CEILING
        axes.barh(-y, ratio - 1, left=1, color=colour, height=0.72)
        axes.plot([low, high], [-y, -y], color=INK, linewidth=1.2)
        axes.text(max(high, 1) * 1.02, -y, f"{ratio:.2f}× {name}", va="center", fontsize=7.5, color=INK)
        if row != previous:
            axes.text(-0.01, -y, row, va="center", ha="right", fontsize=7.5, transform=axes.get_yaxis_transform())
            if previous is not None:
                axes.axhline(0.5 - y, color="#dddddd", linewidth=0.6)
        previous = row
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *(bar[3] for bar in bars)) * 0.9, max(bar[4] for bar in bars) * 3.2)
    axes.set_ylim(-len(bars) + 0.3, 0.7)
    axes.set_yticks([])
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_title("Times as fast as each alternative (line: 95 % interval)", loc="left", fontsize=11)
    axes.set_xlabel(_where(result), fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def roofline(result: Result, path: Path) -> None:
    """Achieved operations per byte and second against what copies and matrix products reached in the same run."""
    ceilings = result["ceilings"]
    figure, axes = plt.subplots(figsize=(9, 5))
    widest = max(ceilings["moved"].values())
    main = ceilings["moved"][max(ceilings["moved"], key=int)]
    intensities = [2**e for e in range(-6, 12)]
    for dtype, flops in ceilings["flops"].items():
        limit = [min(flops, main * i) for i in intensities]
        axes.plot(intensities, limit, color=INK, linewidth=1.2)
        axes.text(intensities[-1], flops, f" {dtype} matrix product", va="center", fontsize=8)
    axes.plot(intensities[:12], [widest * i for i in intensities[:12]], color=INK, linewidth=0.8, linestyle=":")
    axes.text(intensities[3], widest * intensities[3] * 1.3, "in cache", fontsize=8, rotation=33)
    axes.text(intensities[3], main * intensities[3] * 0.45, "in memory", fontsize=8, rotation=33)
    seen = set()
    for row in result["rows"]:
        # Rows without a matrix product are drawn as one operation per byte: their rate is their bandwidth.
        if "wrong" in row or row["bytes"] is None:
            continue
        intensity = max(row["flops"] / row["bytes"], 2**-5)
        kind = row["op"].rstrip("_")
        label = None if kind in seen else kind
        seen.add(kind)
        filled = COLOURS[kind] if row["dtype"] != "bfloat16" else "white"
        rate = intensity * row["bytes"] / row["ours_ms"] * 1e3
        axes.scatter(
            intensity, rate, marker=MARKERS[kind], facecolor=filled, edgecolor=COLOURS[kind], s=44, label=label
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(2**-6, 2**13)
    axes.set_xlabel(f"operations per byte (hollow: bfloat16)      {_where(result)}", fontsize=8)
    axes.set_ylabel("operations per second")
    axes.set_title("Rooflines measured in the same run", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date inside, an unchanged result gives an unchanged file.
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
