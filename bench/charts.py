"""The pictures of `python -m bench report`: ratio bars, roofline, scaling, and where a second look spends its time."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
# Names of parts of a picture are random otherwise, and an unchanged result would change the file.
matplotlib.rcParams["svg.hashsalt"] = "vpt"
import matplotlib.pyplot as plt  # noqa: E402

from bench.report import Result, is_ceiling, strongest  # noqa: E402
from bench.scaling import series  # noqa: E402

OURS, THEIRS, CEILING, INK = "#0072b2", "#999999", "#e69f00", "#222222"
MARKERS = {
    "roi_patch_embed": "o",
    "roi_patches": "s",
    "control_cross_attention": "^",
    "append_visual_kv": "D",
    "packed_linear": "P",
    "decode": "*",
}
COLOURS = {
    "roi_patch_embed": "#0072b2",
    "roi_patches": "#56b4e9",
    "control_cross_attention": "#cc79a7",
    "append_visual_kv": "#009e73",
    "packed_linear": "#e69f00",
    "decode": "#d55e00",
}


def _timed(result: Result) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "wrong" not in row and strongest(row)[0]]


def _where(result: Result) -> str:
    e = result["environment"]
    return f"{e.get('gpu') or e['cpu']}, {e['threads']} CPU threads, torch {e['torch']}, {e['date'][:10]}"


def ratio_bars(result: Result, path: Path, every: bool = True) -> None:
    """Draw how many times as fast as every alternative, or as the strongest, each row is; the line at 1 is "equal"."""
    bars: list[tuple[str, str, float, float, float, bool]] = []
    for row in _timed(result):
        best, _ = strongest(row)
        for name, other in row["alternatives"].items():
            if "absent" not in other and not is_ceiling(name) and (every or name == best):
                numbers = (other["ratio"], other["low"], other["high"], other["noisy"])
                bars.append((row["name"].replace(" |", ","), name, *numbers))
    figure, axes = plt.subplots(figsize=(11, 0.27 * len(bars) + 1.6))
    previous = None
    for y, (row, name, ratio, low, high, noisy) in enumerate(bars):
        colour = OURS if ratio >= 1 else CEILING
        axes.barh(-y, ratio - 1, left=1, color=colour, height=0.72)
        axes.plot([low, high], [-y, -y], color=INK, linewidth=1.2)
        label = f"{ratio:.2f}× {name}" + (" (noisy)" if noisy else "")
        axes.text(max(high, 1) * 1.02, -y, label, va="center", fontsize=7.5, color=INK)
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
    which = "every alternative" if every else "the strongest alternative"
    axes.set_title(f"Times as fast as {which} (line: 95 % interval)", loc="left", fontsize=11)
    axes.set_xlabel(_where(result), fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _save(figure, path, result)


def roofline(result: Result, path: Path) -> None:
    """Draw achieved operations per byte and second against what copies and matrix products reached in the same run."""
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
        if "wrong" in row or row["work"] is None:
            continue
        # Rows without a matrix product stand at the left edge, where a point's height is its bandwidth / 32.
        intensity = max(row["work"]["flops"] / row["work"]["bytes"], 2**-5)
        kind = row["op"].rstrip("_")
        label = None if kind in seen else kind
        seen.add(kind)
        filled = COLOURS[kind] if row["dtype"] != "bfloat16" else "white"
        rate = intensity * row["work"]["bytes"] / row["ours_ms"] * 1e3
        axes.scatter(
            intensity, rate, marker=MARKERS[kind], facecolor=filled, edgecolor=COLOURS[kind], s=44, label=label
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(2**-6, 2**13)
    axes.set_xlabel(f"operations per byte (hollow: bfloat16)      {_where(result)}", fontsize=8)
    axes.set_ylabel("operations per second")
    axes.set_title("Rooflines measured in the same run", loc="left", fontsize=11)
    if seen:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path, result)


STAGES = {
    "crop+embed": ("#56b4e9", "crop, resize, embed"),
    "ViT": ("#0072b2", "vision tower or re-encoder"),
    "perceive": ("#cc79a7", "control state and projector"),
    "append": ("#009e73", "language model: read the look"),
    "rest": ("#bbbbbb", "rest"),
}


def timeline(result: Result, path: Path) -> bool:
    """Return a bar a procedure, from the perception token to the first answer token; False if no look has stages.

    Of a series only the row at its beginning is drawn; turns of conversations, which begin elsewhere, are not.
    """
    rows = [
        row
        for row in result["rows"]
        if row["op"] == "second look" and row.get("timeline") and not row.get("sweep", {}).get("at")
    ]
    if not rows:
        return False
    bars = [
        (row, name, stages)
        for row in rows
        for name, stages in sorted(row["timeline"].items(), key=lambda item: sum(item[1].values()))
    ]
    unknown = {stage for _, _, stages in bars for stage in stages} - STAGES.keys()
    if unknown:
        raise ValueError(f"the chart has no colour for the stages {sorted(unknown)}; add them to STAGES")
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(bars) + 1.7))
    y, names, ticks = 0.0, [], []
    for number, (row, name, stages) in enumerate(bars):
        y -= 1.6 if number and row is not bars[number - 1][0] else 1
        begin = 0.0
        for stage, milliseconds in stages.items():
            axes.barh(y, milliseconds, left=begin, color=STAGES[stage][0], height=0.74)
            begin += milliseconds
        label = f" {begin:.0f} ms" + (f", {row['alternatives'][name]['ratio']:.2f}×" if name != "ours" else "")
        axes.text(begin, y, label, va="center", fontsize=8, color=INK)
        names.append(f"{row['shape'].rsplit(', ', 1)[0]}:  {name}")
        ticks.append(y)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    presets = ", ".join(dict.fromkeys(row["shape"].rsplit(", ", 1)[-1] for row in rows))
    title = f"From the perception token to the first answer token ({presets}, random weights)"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(f"milliseconds      {_where(result)}", fontsize=8)
    used = [stage for stage in STAGES if any(stage in stages for _, _, stages in bars)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=STAGES[stage][0]) for stage in used]
    axes.legend(
        handles,
        [STAGES[stage][1] for stage in used],
        frameon=False,
        fontsize=8,
        ncols=len(used),
        loc="upper center",
        bbox_to_anchor=(0.4, -0.55 / (0.42 * len(bars) + 0.9)),
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    _save(figure, path, result)
    return True


def scaling(result: Result, path: Path) -> bool:
    """Return a panel a series: milliseconds against its size, ours and every alternative; False if there is no
    series.
    """
    found = series(result)
    if not found:
        return False
    across = min(3, len(found))
    down = -(-len(found) // across)
    figure, panels = plt.subplots(down, across, figsize=(4.4 * across, 3.3 * down), squeeze=False)
    for panel in panels.flat[len(found) :]:
        panel.set_visible(False)
    others = [THEIRS, CEILING, "#cc79a7", "#56b4e9", "#009e73"]
    for panel, one in zip(panels.flat, found):
        # No conversation yet is the size 0, which a logarithm has no place for.
        sizes = [max(size, 0.25 * one.sizes[1]) for size in one.sizes]
        for colour, (name, times) in zip(others, one.alternatives.items()):
            panel.plot(sizes, times, color=colour, linewidth=1.2, label=name)
        panel.plot(sizes, one.ours, color=OURS, linewidth=2.2, marker="o", markersize=4, label="ours")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [str(size) for size in one.sizes], fontsize=7)
        panel.minorticks_off()
        panel.set_title("\n".join(textwrap.wrap(one.name, 62)), loc="left", fontsize=8)
        panel.set_xlabel(one.axis, fontsize=8)
        panel.set_ylabel("ms", fontsize=8)
        panel.tick_params(axis="y", labelsize=7)
        panel.legend(frameon=False, fontsize=6.5)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.supxlabel(_where(result), fontsize=8)
    figure.tight_layout()
    _save(figure, path, result)
    return True


def digest(result: Result) -> str:
    """Return a name for the numbers that a picture was drawn from; it stands in the file."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def _save(figure: Any, path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date inside, an unchanged result gives an unchanged file.
    metadata = {"Date": None, "Description": f"drawn from result {digest(result)}"}
    figure.savefig(path, bbox_inches="tight", metadata=metadata if path.suffix == ".svg" else None)
    plt.close(figure)


def targets(rows: list[tuple[str, float, str]], where: str, path: Path) -> None:
    """Draw how far each target of a GPU was reached: (name, reached / wanted, what was measured); 1 is the target."""
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(rows) + 1.4))
    for y, (name, share, measured) in enumerate(rows):
        axes.barh(-y, share, color=OURS if share >= 1 else CEILING, height=0.7)
        axes.text(share + 0.02, -y, measured, va="center", fontsize=8, color=INK)
        axes.text(-0.01, -y, name, va="center", ha="right", fontsize=8, transform=axes.get_yaxis_transform())
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks([])
    axes.set_xlim(0, max([1.0, *(share for _, share, _ in rows)]) * 1.4)
    axes.set_title("Reached of each target (line: the target)", loc="left", fontsize=11)
    axes.set_xlabel(where, fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _save(figure, path, {"rows": rows})
