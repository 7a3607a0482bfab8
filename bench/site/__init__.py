"""The results of every machine become one HTML file here, with charts and a table that sorts and filters; it may import
alternatives, gpu and report.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from bench.alternatives import ALTERNATIVES
from bench.gpu import report as gpu_report
from bench.report import Result, duration, rate, strongest
from bench.site import charts

FOLDER = Path(__file__).parent
COLUMNS = ("call", "ours", "rate", "of the roofline", "strongest alternative", "its time", "ratio", "95 % interval")
SETS = {"quick": "the quick set", "full": "all workloads"}


def page(results: Mapping[str, Mapping[str, Result]], on_gpus: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the file's text.

    results: of each machine the sets that it measured, "quick" and "full". on_gpus: the lines of `make gpu`.
    """
    machines = sorted({*results, *on_gpus})
    parts = [_machine(name, results.get(name, {}), on_gpus.get(name)) for name in machines]
    chosen = "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in machines)
    style, script = ((FOLDER / name).read_text() for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src \
'unsafe-inline'">
<title>vpt: measured</title>
<style>
{style}</style>
</head>
<body>
<header><h1>Measured</h1>
<p>Every call of ours against every alternative that does the same work, timed in pairs in one run: the ratio is the
median of the pairs' ratios with its 95 % interval, and says how many times as fast ours is. Nothing is timed before its
result was compared.</p>
<nav aria-label="Machines">{chosen}</nav></header>
<main>
{"".join(parts)}
</main>
<script>
{script}</script>
</body>
</html>
"""


def _machine(name: str, sets: Mapping[str, Result], on_gpu: list[dict[str, Any]] | None) -> str:
    parts = [f'<section class="machine" id="{escape(name)}"><h2>{escape(name)}</h2>']
    parts += [_set(name, which, result) for which, result in sets.items()]
    if on_gpu:
        targets = gpu_report.targets(on_gpu)
        parts.append(f"<p class='where'>{escape(gpu_report.where(on_gpu))}</p>{charts.targets(targets)}")
    return "".join([*parts, "</section>"])


def _set(machine: str, which: str, result: Result) -> str:
    title = f"{SETS[which]} on {machine}"
    return f"""<details class="set" {"open" if which == "quick" else ""}><summary>{SETS[which].capitalize()}, \
{len(result["rows"])} rows</summary>
{_where(result["environment"])}
<figure><figcaption>Times as fast as the strongest alternative (bar: 95 % interval; left of the line we are \
slower)</figcaption>{charts.ratios(result, title)}</figure>
<figure><figcaption>What was reached of what copies and matrix products reach in the same run</figcaption>\
{charts.roofline(result, title)}</figure>
{_table(result, title)}
{_alternatives(result)}
</details>"""


def _where(environment: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in environment.items() if value != "not installed"}
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in shown.items())
    return f'<dl class="where">{items}</dl>'


def _table(result: Result, title: str) -> str:
    """Return one line per row; the numbers by which it sorts stand beside what is shown."""
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(column)}</button></th>' for column in COLUMNS
    )
    rows = "".join(_row(row) for row in result["rows"])
    label = escape(f"Rows of {title}", quote=True)
    return f"""<label class="filter">Show rows with <input type="search" placeholder="bfloat16, decode, 7b …"></label>
<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{heads}</tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _row(row: Mapping[str, Any]) -> str:
    call = row["name"].replace(" |", ",")
    if "wrong" in row:
        told = f'<td colspan="7">wrong: {escape(row["wrong"])}</td>'
        return f'<tr class="wrong"><th scope="row">{escape(call)}</th>{told}</tr>'
    name, other = strongest(row)
    share = None if row["work"] is None else row["roofline"]
    cells: list[tuple[str, float | None]] = [
        (duration(row["ours_ms"]), row["ours_ms"]),
        ("", None) if row["work"] is None else (rate(row), share),
        ("", None) if share is None else (f"{share:.0%}", share),
        (name, None),
        (duration(other["ms"]), other["ms"]) if name else ("", None),
        (f"{other['ratio']:.2f}×", other["ratio"]) if name else ("", None),
        (f"{other['low']:.2f} … {other['high']:.2f}" + " noisy" * other["noisy"], other["low"]) if name else ("", None),
    ]
    shown = "".join(
        f"<td{'' if number is None else f' data-sort={chr(34)}{number:.6g}{chr(34)}'}>{escape(text)}</td>"
        for text, number in cells
    )
    slower = bool(name) and other["high"] < 1
    return f'<tr{" class=slower" if slower else ""}><th scope="row">{escape(call)}</th>{shown}</tr>'


def _alternatives(result: Result) -> str:
    used = dict.fromkeys(name for row in result["rows"] for name in row.get("alternatives", ()))
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(ALTERNATIVES[name].description)}</dd>"
        for name in used
        if name in ALTERNATIVES
    )
    return f'<details class="how"><summary>How the alternatives were called</summary><dl>{items}</dl></details>'
