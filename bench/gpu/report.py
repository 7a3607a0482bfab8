"""A page and a picture of the committed `results.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
LOOK_TARGETS = {"clip": 3.5, "dino": 4.0, "region, 54 tokens": 3.0, "region, 252 tokens": 6.0, "sam": 10.0}
"""Milliseconds of a second look of the 2B on an H100."""
DECODE_TARGETS = {"2b": 0.60, "7b": 0.75}
"""Of the copy bandwidth measured in the same process."""
OPERATOR_US = 10.0
FLOORED = ("append, 4096", "roi, 16")
"""Calls whose target is a multiple of the copy of their bytes; smaller ones are launches."""


def load(path: Path) -> list[Line]:
    """Return the lines that are whole; a run that was killed may have left half of its last one."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def named(lines: Sequence[Line], name: str) -> Iterator[Line]:
    return (line for line in lines if line["name"] == name)


def where(lines: Sequence[Line]) -> str:
    """Return the machine, in a line."""
    e = next(named(lines, "environment"), {})
    what = e.get("gpu") or f"{e.get('cpu')}, a rehearsal: no number here means anything"
    return f"{what}, torch {e.get('torch')}, commit {e.get('commit')}, {str(e.get('date'))[:10]}"


def targets(lines: Sequence[Line]) -> list[tuple[str, float, str]]:
    """Return (target, reached / wanted, what was measured)."""
    rows = []
    decoded = list(named(lines, "decode"))
    for line in decoded:
        if "of_copy" in line and line["preset"] in DECODE_TARGETS:
            wanted = DECODE_TARGETS[line["preset"]]
            measured = f"{line['of_copy']:.0%} of the copy bandwidth, {line['replay_ms']:.2f} ms"
            rows.append((f"decode {line['preset']} ≥ {wanted:.0%}", line["of_copy"] / wanted, measured))
    ours = next((line for line in decoded if "of_copy" in line and line["preset"] == "2b"), None)
    theirs = next((line for line in decoded if "rival" in line), None)
    if ours and theirs:
        ratio = theirs["events_ms"] / ours["events_ms"]
        rows.append(("decode 2b, not slower than transformers compiled", ratio, f"{ratio:.2f}×"))
    for line in named(lines, "look"):
        wanted = LOOK_TARGETS[line["look"]]
        rows.append((f"look, {line['look']} ≤ {wanted:g} ms", wanted / line["ms"], f"{line['ms']:.2f} ms"))
    for line in named(lines, "operator"):
        if "us" in line and line["call"] in ("append, 54 tokens", "control, identity, 1×256"):
            us = line["us"]["ours"]
            rows.append((f"{line['call']}, {line['backend']} ≤ 10 µs", OPERATOR_US / us, f"{us:.1f} µs"))
        if "us" in line and line["call"].startswith(FLOORED):
            times = line["us"]["ours"] / line["us"]["copy"]
            rows.append((f"{line['call']}, {line['backend']} ≤ 1.5× its bytes", 1.5 / times, f"{times:.2f}×"))
    return rows


def page(lines: Sequence[Line]) -> str:
    """Return Markdown: what ended how, the targets, the operators, what is wrong, and the profiles."""
    out = [where(lines), "", "| part | ended | seconds | |", "|---|---|---|---|"]
    for line in named(lines, "end"):
        summary = str(line["summary"]).replace("|", "/")
        out.append(f"| {line['part']} | {'well' if line['ok'] else '**not**'} | {line['seconds']:g} | {summary} |")
    out += ["", "| target | reached | |", "|---|---|---|"]
    out += [f"| {name} | {'yes' if share >= 1 else '**no**'} | {text} |" for name, share, text in targets(lines)]
    out += ["", "| against float32, a rival or no graphs | error | same token |", "|---|---|---|"]
    for g in named(lines, "gate"):
        of, same = g.get("rival", g.get("replay", "")), g["top1"] if "top1" in g else g["same"]
        out.append(f"| {g['preset']} {of} | {g['error']:.1e} | {same} |")
    out += ["", "| operator | backend | µs | eager µs | copy µs | of the copy |", "|---|---|---|---|---|---|"]
    for line in named(lines, "operator"):
        if "us" in line:
            us = line["us"]
            numbers = f"{us['ours']:.1f} | {us['eager']:.1f} | {us['copy']:.1f} | {line['of_copy']:.0%}"
            out.append(f"| {line['call']} | {line['backend']} | {numbers} |")
        else:
            out.append(f"| {line['call']} | {line['backend']} | {line.get('absent') or line['wrong']} | | | |")
    out += ["", "| tuned | size | best | of |", "|---|---|---|---|"]
    out += [
        f"| {t['kernel']} | {t['size']} | {t['chosen'] or 'the table'} | {len(t['answers'])} of {t['of']} |"
        for t in named(lines, "tuned")
    ]
    for line in named(lines, "profile"):
        out += ["", f"A replay, {line['of']} of the {line['preset']}:", "", "```", line["table"], "```"]
    return "\n".join(out) + "\n"
