"""Results as a terminal table, Markdown and a verdict on two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

Result = dict[str, Any]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SLOWDOWN = 1.1
"""`compare` fails where the run is slower than the other by more than this, relative to the same alternative."""


def load(path: Path) -> Result:
    """A result file.

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
    """One line per alternative: name, milliseconds, ratio, interval."""
    lines = []
    for name, other in row["alternatives"].items():
        if "absent" in other:
            lines.append((name, "–", "–", other["absent"]))
            continue
        interval = f"{other['low']:.2f} … {other['high']:.2f}" + (" noisy" if other["noisy"] else "")
        lines.append((name, f"{other['ms']:.3g}", f"{other['ratio']:.2f}×", interval))
    return lines or [("", "", "", "")]


def _rate(row: dict[str, Any]) -> str:
    if row["bytes"] is None:
        return "–"
    if row["flops"] > 50 * row["bytes"]:
        return (
            f"{row['TFLOP_per_s'] * 1e3:.0f} GFLOP/s" if row["TFLOP_per_s"] < 1 else f"{row['TFLOP_per_s']:.2f} TFLOP/s"
        )
    return f"{row['GB_per_s']:.1f} GB/s"


def _facts(row: dict[str, Any]) -> str:
    facts = [f"{row['roofline']:.0%} of the roofline"] if row["bytes"] is not None else []
    if row["host_us"] is not None:
        facts.append(f"host {row['host_us']:.1f} µs")
    if row["workspace"] is not None:
        facts.append(f"workspace {row['workspace']} B")
    if row["device"] == "cuda" and not row["graph"]:
        facts.append("not captured in a graph")
    return ", ".join(facts)


def terminal(result: Result) -> Table:
    """Every row, wrong ones first of all said to be wrong."""
    title = "  ".join(f"{key} {value}" for key, value in result["environment"].items() if value != "not installed")
    table = Table(
        "row", "ours ms", "rate", "alternative", "ms", "ratio", "95 % interval", title=title, title_style="dim"
    )
    for row in result["rows"]:
        if "wrong" in row:
            table.add_row(row["name"], "[red]WRONG[/]", "not timed", row["wrong"], "", "", "", end_section=True)
            continue
        lines = _cells(row)
        for number, cells in enumerate(lines):
            head = ("", "", "")
            if number == 0:
                head = (row["name"], f"{row['ours_ms']:.3g}", _rate(row))
            elif number == 1:
                head = (f"  {_facts(row)}", "", "")
            table.add_row(*head, *cells, end_section=number == len(lines) - 1)
    return table


def markdown(result: Result) -> str:
    """The same as Markdown, a line per alternative."""
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
            _rate(row),
            f"{row['roofline']:.0%}" if row["bytes"] is not None else "–",
        )
        for cells in _cells(row):
            lines.append("| " + " | ".join((*head, *cells)) + " |")
            head = ("", "", "", "")
    return "\n".join(lines) + "\n"


def readme_block(results: dict[str, Result]) -> str:
    """What the README shows of results/: each machine, and a line per row with the strongest alternative."""
    parts = []
    for machine, result in sorted(results.items()):
        e = result["environment"]
        where = e.get("gpu") or f"{e['cpu']}, {e['threads']} threads, {e['capability']}"
        parts += [
            f"{where}, torch {e['torch']}, transformers {e['transformers']}, commit {e['commit']}, {e['date'][:10]} "
            f"([all rows](bench/results/{machine}/)):",
            "",
            "| call | ours | strongest alternative | ratio (95 % interval) | of the roofline |",
            "|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            if "wrong" in row:
                parts.append(f"| {row['name'].replace(' |', ',')} | **wrong** | | | |")
                continue
            name, other = strongest(row)
            ratio = f"{other['ratio']:.2f}× ({other['low']:.2f} … {other['high']:.2f})" if name else ""
            roofline = "" if row["bytes"] is None else f"{row['roofline']:.0%}"
            cells = (row["name"].replace(" |", ","), _milliseconds(row["ours_ms"]), name, ratio, roofline)
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g} µs" if value < 0.1 else f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def is_ceiling(name: str) -> bool:
    """Whether an alternative does only part of the work, and so bounds what can be reached."""
    return any(word in name for word in ("alone", "copy of", "floor"))


def strongest(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The fastest alternative that does the same work; ("", {}) if there is none."""
    found = [
        (name, other) for name, other in row["alternatives"].items() if "absent" not in other and not is_ceiling(name)
    ]
    return min(found, key=lambda item: item[1]["ms"], default=("", {}))


def replace_block(text: str, block: str) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text has no {BEGIN} … {END}: put both markers where the numbers belong")
    return f"{before}{BEGIN}\n{block}{END}{after}"


def compare(before: Result, after: Result, threshold: float = SLOWDOWN) -> tuple[Table, list[str]]:
    """The change of every common row, and the names of those that became slower, wrong or vanished.

    A row's change is that of its ratio to the same strongest alternative, so that a slower machine is no slower row.
    Only a change whose whole 95 % interval lies beyond `threshold` counts.
    """
    table = Table("row", "alternative", "before", "after", "slower by", "95 % interval")
    new = {row["name"]: row for row in after["rows"]}
    failures = []
    for old in before["rows"]:
        name, row = old["name"], new.get(old["name"])
        if row is None or "wrong" in row:
            table.add_row(name, "", "", "missing" if row is None else "wrong", "", "", style="red")
            failures.append(name)
            continue
        if "wrong" in old:
            continue
        other, was = strongest(old)
        now = row["alternatives"].get(other)
        if not now or "absent" in now:
            continue
        low, change, high = was["low"] / now["high"], was["ratio"] / now["ratio"], was["high"] / now["low"]
        failed = low > threshold
        failures += [name] * failed
        cells = (f"{was['ratio']:.2f}×", f"{now['ratio']:.2f}×", f"{change:.2f}×", f"{low:.2f} … {high:.2f}")
        table.add_row(name, other, *cells, style="red" if failed else "")
    return table, failures
