"""What the CPU rows were meant to reach, set before they were measured, against what they reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report import Result, duration


@dataclass(frozen=True)
class Goal:
    """Rows of one call against one alternative, and the least ratio of each; without one: the most microseconds."""

    call: str
    against: str
    rows: tuple[tuple[str, float], ...]


_PHOTO = "roi_patch_embed | 512×384, 1 region, ≤ 12.8 Mpx | float32"
_LARGE = "roi_patch_embed | 4000×3000, 1 region, ≤ 1.0 Mpx | float32"
_PATCHES = ("512×384, 1 region, ≤ 12.8 Mpx", "4000×3000, 1 region, ≤ 1.0 Mpx", "1700×2200, 4 regions, ≤ 512 px")
_CONTROL = "control_cross_attention | {} | float32"
_APPEND = "append_visual_kv | {} tokens, 2b | {}"
_LOOKS = tuple(
    f"second look | {look}, 2b-slice | float32" for look in ("clip", "region:x3,y3,x3,y3", "region:x2,y1,x5,y4")
)
_DECODE = "decode | one token, 2b-slice | float32"

GOALS = (
    Goal(
        "`roi_patch_embed`, 512×384 / 4000×3000 → 1 Mpx",
        "transformers' Pillow processor + F.linear",
        ((_PHOTO, 3), (_LARGE, 5)),
    ),
    Goal("the same", "F.interpolate, not exact, + F.linear", ((_PHOTO, 1), (_LARGE, 1))),
    Goal(
        "`roi_patches`, the same and 4 regions of a document",
        "F.interpolate, not exact",
        tuple((f"roi_patches | {shape} | uint8", 0.5) for shape in _PATCHES),
    ),
    Goal(
        "`control_cross_attention`, identity 2B / 7B, linear 2B",
        "eager",
        (
            (_CONTROL.format("identity, 1×252 tokens, 2b"), 2),
            (_CONTROL.format("identity, 1×252 tokens, 7b"), 2),
            (_CONTROL.format("linear, 1×256 tokens, 2b"), 1.2),
        ),
    ),
    Goal(
        "`append_visual_kv`, 270 / 4096 tokens, float32",
        "transformers rotary + StaticCache",
        ((_APPEND.format(270, "float32"), 3), (_APPEND.format(4096, "float32"), 8)),
    ),
    Goal(
        "the same, then bfloat16",
        "copy of the same bytes",
        tuple((_APPEND.format(n, dtype), 0.4) for dtype in ("float32", "bfloat16") for n in (270, 4096)),
    ),
    Goal("planning a region never seen", "", (("plan_regions | host time, one region never seen | –", 10),)),
    Goal(
        "second look: clip / crop of 54 / of 324 tokens",
        "published procedure",
        tuple(zip(_LOOKS, (8, 5, 2))),
    ),
    Goal("the same", "transformers, cache continued with explicit positions", tuple((row, 1.15) for row in _LOOKS)),
    Goal("one decoded token", "transformers, its cache continued", ((_DECODE, 1.1),)),
    Goal("the same", "floor: the weights read once", ((_DECODE, 0.7),)),
)


def table(results: Sequence[Result]) -> str:
    """Markdown; a row's number is from the first of the results that has it, and says so where it misses its goal."""
    rows = {row["name"]: row for result in reversed(results) for row in result["rows"]}
    lines = ["| CPU call | against | goal | reached |", "|---|---|---|---|"]
    for goal in GOALS:
        wanted, reached = [], []
        for name, limit in goal.rows:
            row = rows.get(name, {"wrong": "not measured"})
            if goal.against:
                wanted.append(f"{limit:g}×")
                value = None if "wrong" in row else row["alternatives"][goal.against].get("ratio")
                met, shown = value is not None and value >= limit, f"{value:.3g}×" if value else "not measured"
            else:
                wanted.append(duration(limit / 1e3))
                value = row.get("ours_ms")
                met, shown = value is not None and value * 1e3 <= limit, duration(value) if value else "not measured"
            reached.append(shown if met or not value else f"**{shown}: missed**")
        wanted = wanted[:1] if len(set(wanted)) == 1 else wanted
        lines.append(f"| {goal.call} | {goal.against} | {' / '.join(wanted)} | {', '.join(reached)} |")
    return "\n".join(lines) + "\n"
