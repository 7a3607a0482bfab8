"""What the CPU rows were meant to reach, set before they were measured, against what they reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cases import Alternative, append, control, decode, engine, host, roi
from bench.report import Result, duration
from bench.workloads import (
    DOCUMENT,
    LARGE,
    MEGAPIXEL,
    PHOTO,
    REGIONS,
    Append,
    Control,
    Decode,
    DropInImage,
    HostCall,
    Roi,
    Row,
    SecondLook,
)


@dataclass(frozen=True)
class Goal:
    """What a call was meant to reach: rows with the least ratio of each to `against`, or the most microseconds.

    reason: why rows that miss the goal do; the page of results repeats it for as long as one does.
    """

    call: str
    against: Alternative | None
    rows: tuple[tuple[Row, float], ...]
    reason: str = ""


_EMBEDDED = (
    Row("roi_patch_embed", Roi(*PHOTO, 1, "float32", max_pixels=12_845_056)),
    Row("roi_patch_embed", Roi(*LARGE, 1, "float32", max_pixels=MEGAPIXEL)),
)
_PATCHES = (
    Row("roi_patches", Roi(*PHOTO, 1, "uint8", max_pixels=12_845_056)),
    Row("roi_patches", Roi(*LARGE, 1, "uint8", max_pixels=MEGAPIXEL)),
    Row("roi_patches", Roi(*DOCUMENT, 4, "uint8", longest_edge=512)),
)
_IDENTITY = {lm: Row("control_cross_attention", Control("identity", 1, 252, lm, "float32")) for lm in ("2b", "7b")}
_LINEAR = Row("control_cross_attention", Control("linear", 1, 256, "2b", "float32"))
_APPENDED = {
    (tokens, dtype): Row("append_visual_kv", Append(tokens, "2b", dtype))
    for dtype in ("float32", "bfloat16")
    for tokens in (270, 4096)
}
_PLANNED = Row("plan_regions", HostCall(host.MAKERS["plan_regions"][1]))
_LOOKS = tuple(Row(SecondLook.op, SecondLook("2b-slice", look)) for look in ("clip", *REGIONS))
_DECODED = Row(Decode.op, Decode("2b-slice"))

GOALS = (
    Goal("`roi_patch_embed`, 512×384 / 4000×3000 → 1 Mpx", roi.PROCESSOR, tuple(zip(_EMBEDDED, (3, 5)))),
    Goal("the same", roi.INTERPOLATE, tuple((row, 1) for row in _EMBEDDED)),
    Goal("`roi_patches`, the same and 4 regions of a document", roi.RESIZE, tuple((row, 0.5) for row in _PATCHES)),
    Goal(
        "`control_cross_attention`, identity 2B / 7B, linear 2B",
        control.EAGER,
        ((_IDENTITY["2b"], 2), (_IDENTITY["7b"], 2), (_LINEAR, 1.2)),
        "The identity form on the 2B stands at its goal within the noise, on either side of it from run to run.",
    ),
    Goal(
        "`append_visual_kv`, 270 / 4096 tokens, float32",
        append.TRANSFORMERS,
        ((_APPENDED[270, "float32"], 3), (_APPENDED[4096, "float32"], 8)),
        "The copy of the bytes of 4096 tokens alone takes two thirds of our time, so even a free rotation would not "
        "reach 8×; with 270 tokens the row stands on either side of its goal from run to run (2.8 … 3.3).",
    ),
    Goal(
        "the same, then bfloat16",
        append.COPY,
        tuple((row, 0.4) for row in _APPENDED.values()),
        "The rotation of bfloat16 is computed in float32, and for 270 tokens that takes most of the time.",
    ),
    Goal("planning a region never seen", None, ((_PLANNED, 10),)),
    Goal("second look: clip / crop of 54 / of 324 tokens", engine.PUBLISHED, tuple(zip(_LOOKS, (8, 5, 2)))),
    Goal("the same", engine.CONTINUED, tuple((row, 1.15) for row in _LOOKS)),
    Goal("one decoded token", decode.DECODED, ((_DECODED, 1.1),)),
    Goal("the same", decode.FLOOR, ((_DECODED, 0.7),)),
)
HEADLINE = (
    *_EMBEDDED,
    _IDENTITY["2b"],
    _LINEAR,
    _APPENDED[270, "float32"],
    _APPENDED[4096, "float32"],
    Row("drop-in", DropInImage(*PHOTO, 12_845_056)),
    *_LOOKS[:2],
    _DECODED,
)
"""The rows that the README shows."""


def _by_name(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for result in reversed(results) for row in result["rows"]}


def _reached(goal: Goal, row: Row, limit: float, rows: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """Return what one row reached, as text, and whether that misses its limit; what was not measured does not."""
    found = rows.get(row.name, {"wrong": "not measured"})
    if goal.against is None:
        value = found.get("ours_ms")
        return (duration(value), value * 1e3 > limit) if value else ("not measured", False)
    value = None if "wrong" in found else found["alternatives"][goal.against.name].get("ratio")
    return (f"{value:.3g}×", value < limit) if value else ("not measured", False)


def table(machines: Mapping[str, Sequence[Result]]) -> str:
    """Return Markdown, a column a machine; a row's number is from the first of the machine's results that has it.

    A number that misses its goal says so.
    """
    rows = [_by_name(results) for results in machines.values()]
    reached = "".join(f" reached, {where(results[0])} |" for results in machines.values())
    lines = [f"| CPU call | against | goal |{reached}", f"|---|---|---|{'---|' * len(machines)}"]
    for goal in GOALS:
        wanted = [f"{limit:g}×" if goal.against else duration(limit / 1e3) for _, limit in goal.rows]
        wanted = wanted[:1] if len(set(wanted)) == 1 else wanted
        cells = [goal.call, goal.against.name if goal.against else "", " / ".join(wanted)]
        for found in rows:
            shown = [_reached(goal, row, limit, found) for row, limit in goal.rows]
            cells.append(", ".join(f"**{text}: missed**" if missed else text for text, missed in shown))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def reasons(machines: Mapping[str, Sequence[Result]]) -> str:
    """Return Markdown: why each goal is missed that is, and where.

    Raises:
        ValueError: a goal is missed and states no reason.
    """
    lines = []
    for goal in GOALS:
        missed: dict[str, list[str]] = {}
        for results in machines.values():
            rows = _by_name(results)
            for row, limit in goal.rows:
                if _reached(goal, row, limit, rows)[1]:
                    missed.setdefault(row.name.replace(" |", ","), []).append(where(results[0]))
        if missed and not goal.reason:
            raise ValueError(
                f"{list(missed)} miss the goal {goal.call!r}, which states no reason: write it into bench/goals.py"
            )
        named = [name if len(machines) == 1 else f"{name} ({', '.join(on)})" for name, on in missed.items()]
        lines += [f"- {', '.join(named)}: {goal.reason}"] if missed else []
    return "\n".join(lines) + "\n"


def where(result: Result) -> str:
    """Return a machine in three words: processor, vector unit, threads."""
    e = result["environment"]
    processor = e["cpu"].replace("(R)", "").replace(" Processor", "")
    return f"{processor}, {e['capability']}, {e['threads']} threads"
