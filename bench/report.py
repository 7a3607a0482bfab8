"""Results as a terminal table, Markdown and a verdict on two runs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.alternatives import ALTERNATIVES

Result = dict[str, Any]
SLOWDOWN = 1.1
"""`compare` fails where the run is slower than the other by more than this, relative to the same alternative."""


def load(path: Path) -> Result:
    """Return a result file.

    Raises:
        ValueError: it is not one.
    """
    try:
        result = json.loads(path.read_text())
        result["rows"], result["environment"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of `python -m bench run` ({error!r}); run it again") from error
    return result


def _cells(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one line per alternative: name, milliseconds, ratio, interval."""
    lines = []
    for name, other in row["alternatives"].items():
        if "absent" in other:
            lines.append((name, "–", "–", other["absent"]))
            continue
        interval = f"{other['low']:.2f} … {other['high']:.2f}" + (" noisy" if other["noisy"] else "")
        lines.append((name, f"{other['ms']:.3g}", f"{other['ratio']:.2f}×", interval))
    return lines or [("", "", "", "")]


def rate(row: Mapping[str, Any]) -> str:
    """Return the share reached of what bounds the row."""
    if row["work"] is None:
        return "–"
    if row["bound"] == "bytes":
        return f"{row['GB_per_s']:.1f} GB/s"
    rate = row["TFLOP_per_s"]
    return f"{rate * 1e3:.0f} GFLOP/s" if rate < 1 else f"{rate:.2f} TFLOP/s"


def _facts(row: dict[str, Any]) -> str:
    facts = [f"{row['roofline']:.0%} of the roofline"] if row["work"] is not None else []
    if row["host_us"] is not None:
        facts.append(f"host {row['host_us']:.1f} µs")
    if row["workspace"] is not None:
        facts.append(f"workspace {row['workspace']} B")
    if row["device"] == "cuda" and not row["graph"]:
        facts.append("not captured in a graph")
    return ", ".join(facts)


def in_a_line(row: dict[str, Any]) -> str:
    """Return what a row shows before it is merged: our time, and the ratio of its strongest alternative."""
    if "wrong" in row:
        return f"WRONG, {row['wrong']}"
    name, other = strongest(row)
    against = f", {other['ratio']:.2f}× {name}" if name else ""
    return f"{duration(row['ours_ms'])}{against} ({row['rounds']} rounds)"


def terminal(result: Result) -> Table:
    """Return every row, wrong ones first of all said to be wrong."""
    title = "  ".join(f"{key} {value}" for key, value in result["environment"].items() if value != "not installed")
    table = Table(
        "row", "ours ms", "rate", "alternative", "ms", "ratio", "95 % interval", title=title, title_style="dim"
    )
    for row in result["rows"]:
        if "wrong" in row:
            table.add_row(row["name"], "[red]WRONG[/]", "not timed", row["wrong"], "", "", "", end_section=True)
            continue
        lines, facts = _cells(row), _facts(row)
        lines += [("", "", "", "")] * (len(lines) == 1 and facts != "")
        for number, cells in enumerate(lines):
            head = ("", "", "")
            if number == 0:
                head = (row["name"], f"{row['ours_ms']:.3g}", rate(row))
            elif number == 1:
                head = (f"  {facts}", "", "")
            table.add_row(*head, *cells, end_section=number == len(lines) - 1)
    return table


def markdown(result: Result) -> str:
    """Return the same as Markdown, a line per alternative, and how the alternatives were called."""
    lines = [
        "| row | ours ms | rate | % of roofline | against | ms | ratio | 95 % interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "wrong" in row:
            lines.append(f"| {row['name'].replace('|', ',')} | **wrong**, not timed | | | {row['wrong']} | | | |")
            continue
        head = (
            row["name"].replace(" |", ","),
            f"{row['ours_ms']:.3g}",
            rate(row),
            f"{row['roofline']:.0%}" if row["work"] is not None else "–",
        )
        for cells in _cells(row):
            lines.append("| " + " | ".join((*head, *cells)) + " |")
            head = ("", "", "", "")
    used = dict.fromkeys(name for row in result["rows"] for name in row.get("alternatives", ()))
    lines += ["", "## The alternatives", "", "| alternative | how it was called |", "|---|---|"]
    lines += [f"| {name} | {ALTERNATIVES[name].description} |" for name in used]
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Result], folder: str, only: Collection[str] = ()) -> str:
    """Return Markdown: each machine, and a line per row with the strongest alternative.

    folder: where the page finds the machines' results. only: the names of the rows that are shown; all without it.
    """
    parts = []
    for machine, result in sorted(results.items()):
        e = result["environment"]
        where = e.get("gpu") or f"{e['cpu']}, {e['threads']} threads, {e['capability']}"
        parts += [
            f"{where}, torch {e['torch']}, transformers {e['transformers']}, commit {e['commit']}, {e['date'][:10]} "
            f"([all rows]({folder}/{machine}/quick.md)):",
            "",
            "| call | ours | strongest alternative | ratio (95 % interval) | of the roofline |",
            "|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            if only and row["name"] not in only:
                continue
            if "wrong" in row:
                parts.append(f"| {row['name'].replace(' |', ',')} | **wrong** | | | |")
                continue
            name, other = strongest(row)
            ratio = f"{other['ratio']:.2f}× ({other['low']:.2f} … {other['high']:.2f})" if name else ""
            ratio += " noisy" if name and other["noisy"] else ""
            roofline = "" if row["work"] is None else f"{row['roofline']:.0%}"
            cells = (row["name"].replace(" |", ","), duration(row["ours_ms"]), name, ratio, roofline)
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def duration(milliseconds: float) -> str:
    if milliseconds < 0.1:
        return f"{milliseconds * 1e3:.3g} µs"
    return f"{milliseconds:.2f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def is_ceiling(name: str) -> bool:
    """Return whether an alternative does only part of the work, and so bounds what can be reached."""
    return any(word in name for word in ("alone", "copy of", "floor"))


def strongest(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the fastest alternative that does the same work; ("", {}) if there is none."""
    found = [
        (name, other) for name, other in row["alternatives"].items() if "absent" not in other and not is_ceiling(name)
    ]
    return min(found, key=lambda item: item[1]["ms"], default=("", {}))


def replace_block(text: str, name: str, block: str) -> str:
    """Return `text` with what stands between the markers of this name replaced.

    Raises:
        ValueError: the markers are missing.
    """
    begins, ends = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = text.partition(begins)
    _, end, after = rest.partition(ends)
    if not begin or not end:
        raise ValueError(f"the text has no {begins} … {ends}: put both markers where the numbers belong")
    return f"{before}{begins}\n{block}{ends}{after}"


def _yardstick(row: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Return what a row is compared by: its strongest alternative, else a ceiling, else its own time, as a speed."""
    name, other = strongest(row)
    if name:
        return name, other
    for name, other in row["alternatives"].items():
        if "absent" not in other:
            return name, other
    speed = {"ratio": 1 / row["ours_ms"], "low": 1 / row["ours_high"], "high": 1 / row["ours_low"]}
    return "", speed


def compare(before: Result, after: Result, threshold: float = SLOWDOWN) -> tuple[Table, list[str], float]:
    """Return the change of every common row, the names of those that became slower, wrong or vanished, and an
    agreement.

    A row's change is that of its ratio to the same strongest alternative, so that a slower machine is no slower row;
    rows without one compare their own time. Only a change whose whole interval lies beyond `threshold` counts. The
    agreement is the share of rows whose two intervals overlap.
    """
    table = Table("row", "alternative", "before", "after", "slower by", "95 % interval")
    new = {row["name"]: row for row in after["rows"]}
    failures, overlapping = [], []
    for old in before["rows"]:
        name, row = old["name"], new.get(old["name"])
        if row is None or "wrong" in row:
            table.add_row(name, "", "", "missing" if row is None else "wrong", "", "", style="red")
            failures.append(name)
            continue
        if "wrong" in old:
            continue
        other, was = _yardstick(old)
        now = row["alternatives"].get(other) if other else _yardstick(row)[1]
        if not now or "absent" in now:
            table.add_row(name, other, "", "not installed any more", "", "")
            continue
        overlapping.append(was["low"] <= now["high"] and now["low"] <= was["high"])
        low, change, high = was["low"] / now["high"], was["ratio"] / now["ratio"], was["high"] / now["low"]
        failed = low > threshold
        failures += [name] * failed
        shown = [f"{one['ratio']:.2f}×" if other else duration(1 / one["ratio"]) for one in (was, now)]
        cells = (*shown, f"{change:.2f}×", f"{low:.2f} … {high:.2f}")
        table.add_row(name, other, *cells, style="red" if failed else "")
    return table, failures, sum(overlapping) / max(1, len(overlapping))
