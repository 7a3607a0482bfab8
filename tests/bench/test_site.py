"""The page of results: every row of every machine is there with its numbers, and nothing comes from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from bench import __main__ as command
from bench import report, site
from bench.site import charts


class Reader(HTMLParser):
    """Collects the cells of every table row, and whether each element that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.sorts: list[list[float]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.sorts.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.sorts[-1] += [float(value) for name, value in attributes if name == "data-sort" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def made(name: str = "op | shape | float32", **changes: Any) -> dict[str, Any]:
    other = {"ms": 3.0, "ratio": 1.5, "low": 1.4, "high": 1.6, "noisy": False}
    row = {"name": name, "op": "op", "shape": "shape", "dtype": "float32", "device": "cpu", "graph": False}
    row |= {"ours_ms": 2.0, "ours_low": 1.9, "ours_high": 2.1, "host_us": None, "workspace": 0, "roofline": 0.5}
    row |= {"work": {"bytes": 4e6, "flops": 8e9}, "bound": "flops", "TFLOP_per_s": 4.0, "GB_per_s": 2.0}
    return row | {"alternatives": {"eager": other}} | changes


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    ceilings = {"device": "cpu", "moved": {"1048576": 2e11, "268435456": 5e10}, "flops": {"float32": 8e12}}
    return {"environment": {"cpu": "<made up>", "date": "2026"}, "ceilings": ceilings, "rows": list(rows)}


def test_the_committed_results_are_all_there(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.html"
    ran = CliRunner().invoke(command.app, ["report", "--html", str(out)])
    assert ran.exit_code == 0, ran.output
    read, text = Reader(out.read_text()), out.read_text()
    assert read.open == []
    shown = {(row[0], row[4], row[6]) for row in read.rows if len(row) == len(site.COLUMNS)}
    committed = command.committed()
    assert committed
    for machine, sets in committed.items():
        assert f'id="{machine}"' in text
        for row in (row for one in sets.values() for row in one["rows"] if "wrong" not in row):
            name, other = report.strongest(row)
            assert (row["name"].replace(" |", ","), name, f"{other['ratio']:.2f}×" if name else "") in shown
    rows = sum(len(one["rows"]) for sets in committed.values() for one in sets.values())
    assert len(read.rows) == rows + sum(len(sets) for sets in committed.values())


def test_numbers_are_shown_with_units_and_sort_by_value() -> None:
    read = Reader(site.page({"m": {"quick": result(made())}}, {}))
    assert read.rows[1] == [
        "op, shape, float32",
        "2.00 ms",
        "4.00 TFLOP/s",
        "50%",
        "eager",
        "3.00 ms",
        "1.50×",
        "1.40 … 1.60",
    ]
    assert read.sorts[1] == [2.0, 0.5, 0.5, 3.0, 1.5, 1.4]


def test_rows_without_work_or_alternative_and_wrong_ones() -> None:
    rows = made("a", alternatives={}), made("b", work=None), {"name": "c", "op": "op", "wrong": "off by <one>"}
    text = site.page({"m": {"quick": result(*rows)}}, {})
    read = Reader(text)
    assert read.rows[1][4:] == [""] * 4 and read.rows[2][2:4] == ["", ""]
    assert read.rows[3] == ["c", "wrong: off by <one>"] and "off by &lt;one&gt;" in text
    nothing = result({"name": "c", "op": "op", "wrong": "?"})
    assert "No row has an alternative" in site.page({"m": {"full": nothing}}, {})


def test_names_are_text_and_never_markup() -> None:
    text = site.page({"m<b>": {"quick": result(made("<script>x</script> | & | float32"))}}, {})
    assert "<script>x" not in text and "<b>" not in text and "<made up>" not in text
    assert Reader(text).rows[1][0] == "<script>x</script>, &, float32"


def test_nothing_comes_from_elsewhere() -> None:
    text = site.page(command.committed(), {})
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|url\(|@import|https?://", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("chart", [charts.ratios, charts.roofline])
def test_charts_are_drawn_within_their_frame_and_named(chart: Any) -> None:
    slow = {"eager": {"ms": 1.0, "ratio": 0.2, "low": 0.1, "high": 0.3, "noisy": True}}
    rows = [made(f"row {number}") for number in range(9)] + [made("slow", alternatives=slow, dtype="bfloat16")]
    svg = ElementTree.fromstring(chart(result(*rows), "made up"))[0]
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    assert svg.attrib["role"] == "img" and "made up" in svg.attrib["aria-label"]
    marks = list(svg.iter("circle"))
    assert len(marks) == 10
    for mark in marks:
        assert 0 < float(mark.attrib["cx"]) < width and 0 < float(mark.attrib["cy"]) < height
    assert len([title for title in svg.iter("title") if "row " in (title.text or "")]) == 9


def test_a_ratio_stands_where_the_axis_says() -> None:
    axis = charts.Axis(0.25, 4, 100, 500)
    assert [axis(number) for number in (0.1, 0.25, 0.5, 1, 2, 4, 9)] == [100, 100, 200, 300, 400, 500, 500]
    assert list(axis.powers(2)) == [0.25, 0.5, 1, 2, 4]
    kinds = {"ahead": 1.1, "behind": 0.5, "even": 0.9}
    for kind, low in kinds.items():
        other = {"ms": 3.0, "ratio": low * 1.2, "low": low, "high": low * 1.5, "noisy": False}
        drawn = charts.ratios(result(made(alternatives={"eager": other})), "")
        assert re.findall(r'<g class="(\w+)">', drawn) == [kind]


def test_targets_of_a_gpu() -> None:
    svg = ElementTree.fromstring(charts.targets([("reached", 1.25, "5 ms"), ("missed", 0.5, "9 ms")]))[0]
    wide, narrow = (float(bar.attrib["width"]) for bar in svg.iter("rect"))
    assert wide == pytest.approx(2.5 * narrow) and [g.attrib["class"] for g in svg.iter("g")] == ["ahead", "behind"]


def test_a_load_is_told_in_sentences() -> None:
    from bench.load import Load

    load = Load(2, right=3, ahead=1, seconds=2.0)
    load.waited, load.answered, load.resident = [0.1] * 8, [0.5] * 8, [100, 100, 110, 110, 120, 120, 115, 115]
    lines = load.lines()
    assert lines[0].startswith("2 people at once, 8 questions in 2 s, 0 errors, 3 answers right, at most 1 ")
    assert "median 0.10 s" in lines[1] and "median 0.50 s" in lines[1] and "100, 110, 120, 115 MiB" in lines[2]
    json.dumps(lines)


@pytest.mark.slow
def test_eight_people_at_once() -> None:
    """The queue works, nothing goes wrong, and the server's memory stays where it is."""
    from bench.load import measure

    load = measure(8, 200)
    assert load.problems == [] and len(load.answered) == len(load.waited) == 200 and 1 <= load.ahead <= 7
    assert max(load.resident[150:]) <= 1.05 * max(load.resident[50:100])
