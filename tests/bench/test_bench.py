"""The benchmark itself: wrong and slow things are noticed, intervals are honest, the README follows the results."""

from __future__ import annotations

import dataclasses
import gc
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench import __main__ as command
from bench import charts, goals, report, rows, scaling, workloads
from bench.alternatives import ALTERNATIVES, CASES
from bench.cases import Alternative, Case, WrongResult, append, control, host, linear, require_close, roi
from bench.rooflines import Ceilings, Work, append_work, product_work
from bench.rows import measure, merge, wrong_row
from bench.timers import Ratio, median_interval, paired_ratio
from bench.workloads import DROP_IN_IMAGES
from tests.bench.made_up import TIME, Pedantic, case
from tests.helpers import numbers

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"cpu": "made up", "capability": "AVX2", "threads": 2}
INTEGERS = {"int8": 1e-4, "int4": 1e-4, "w8a8": 2e-2}
"""What our product may be off by, relative, beside weights of integers."""
KEPT = ("float32", "bfloat16", "int8", "w8a8", "int4")
CEILINGS = Ceilings("cpu", {1 << 20: 1e9, 1 << 28: 1e8}, {"float32": 1e10})


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch) -> None:
    monkeypatch.setattr(rows, "clock", lambda device: lambda: TIME.now)


def result(*made: Case) -> dict[str, Any]:
    rows = [measure(one, Pedantic()) for one in made]
    return {"environment": {"cpu": "made up"}, "ceilings": CEILINGS.as_dict(), "rows": rows}


# With an alternative, with nothing but a ceiling, and with neither, as the host rows.
@pytest.mark.parametrize("others", ({"eager": 4e-3}, {"copy of the same bytes": 4e-4}, {}))
def test_a_planted_slowdown_is_noticed(others) -> None:
    before = merge([[result(case(1e-3, **others))]])
    same, slow = merge([[result(case(1e-3, **others))]]), merge([[result(case(2e-3, **others))]])
    assert report.compare(before, same)[1:] == ([], 1.0)
    assert report.compare(before, slow)[1:] == ([before["rows"][0]["name"]], 0.0)
    assert report.compare(slow, before)[1] == []


def test_a_slower_machine_is_no_slowdown() -> None:
    before, after = merge([[result(case(1e-3, eager=4e-3))]]), merge([[result(case(3e-3, eager=12e-3))]])
    assert report.compare(before, after)[1] == []


def test_missing_and_wrong_rows_fail_a_comparison() -> None:
    before = merge([[result(case(eager=2e-3))]])
    wrong = {**before, "rows": [wrong_row(case(), WrongResult("off by one"))]}
    assert report.compare(before, wrong)[1] == report.compare(before, {**before, "rows": []})[1] != []


@pytest.mark.parametrize(
    "build, workload",
    [
        (append.build, workloads.Append(5, "2b", "float32", capacity=16)),
        (append.build, workloads.NormedAppend(5, "2b", "float32", capacity=16)),
        (control.build, workloads.Control("identity", 1, 3, "2b", "float32")),
        (roi.build, workloads.Roi(320, 240, 1, "float32", longest_edge=256)),
    ],
)
def test_a_planted_wrong_result_is_never_timed(monkeypatch, build, workload) -> None:
    module = {append.build: append, control.build: control, roi.build: roi}[build]
    name = {append: "append_visual_kv", control: "control_cross_attention", roi: "roi_patch_embed"}[module]
    good = getattr(module, name)
    made = build(workload, "cpu")
    made.check()
    monkeypatch.setattr(module, name, lambda *arguments, **options: good(*arguments, **options) * 1.01)
    benchmark = Pedantic()
    with pytest.raises(WrongResult, match="not timed"):
        measure(made, benchmark)
    assert benchmark.calls == 0


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16", "int8", "int4", "w8a8"])
def test_a_wrong_product_is_never_timed(monkeypatch, kept) -> None:
    monkeypatch.setattr(linear, "ROTATION_BYTES", 0)
    made = linear.build(workloads.Product(3, "2b", kept), "cpu")
    made.check()
    assert made.work.flops == 2 * 3 * 1536 * 8960 and (made.work.byte_products > 0) == (kept in INTEGERS)
    assert isinstance(made.alternatives["_weight_int8pack_mm"], str) == (kept not in ("int8", "w8a8"))
    assert isinstance(made.alternatives["_weight_int4pack_mm_for_cpu"], str) == (kept != "int4")
    ours, off = made.ours[0], 3 * INTEGERS.get(kept, 1e-4)
    for planted in (lambda: ours() * (1 + off), lambda: ours().roll(1, 1)):
        made.ours[0] = planted
        benchmark = Pedantic()
        with pytest.raises(WrongResult, match="packed_linear: ours: .*not timed"):
            measure(made, benchmark)
        assert benchmark.calls == 0


def test_close_is_never_nan_or_another_shape() -> None:
    ones = torch.ones(3)
    require_close("equal", ones, ones, 0.0)
    for other in (ones * float("nan"), torch.ones(4), ones * 1.1):
        with pytest.raises(WrongResult):
            require_close("different", ones, other, 1e-2)


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    generator, hits = numbers("intervals"), 0
    for _ in range(400):
        ours, theirs = (generator.lognormal(0.0, 0.3, 41) for _ in range(2))
        ratio = paired_ratio((theirs * 2).tolist(), ours.tolist())
        assert ratio.low <= ratio.ratio <= ratio.high
        hits += ratio.low <= 2 <= ratio.high
    assert hits >= 0.93 * 400


@pytest.mark.parametrize("count, low, high", ((6, 0, 5), (9, 1, 7), (20, 5, 14), (101, 40, 60)))
def test_order_statistics_of_the_sign_test(count, low, high) -> None:
    """Tables of the binomial distribution: the largest r with 2 · P(at most r of count heads) ≤ 5 %."""
    values = numbers("order", count).permutation(count).tolist()
    assert median_interval(values) == (low, high)


def test_paired_ratio_wants_pairs_and_enough_of_them() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        paired_ratio([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least 6"):
        paired_ratio([1.0] * 5, [1.0] * 5)


def test_rounds_begin_with_another_alternative_each_time_and_collect_no_garbage() -> None:
    order: list[str] = []
    names = ("a", "b", "c", "ours")

    def call(name: str) -> Any:
        return lambda: (order.append(name), TIME.call(1e-3)(), gc.isenabled() and order.append("collected"))

    calls = {name: [call(name)] for name in names}
    made = Case("op", "made up", "float32", "cpu", calls.pop("ours"), calls, lambda: None, None)
    row = measure(made, Pedantic())
    assert gc.isenabled()
    timed = order[-4 * row["rounds"] :]
    assert "collected" not in timed and timed[3::4] == ["ours"] * row["rounds"]
    assert {timed[4 * i] for i in range(row["rounds"])} == {"a", "b", "c"}


def test_noise_is_named() -> None:
    assert Ratio(2.0, 1.5, 2.6).noisy and not Ratio(2.0, 1.9, 2.1).noisy


def test_processes_are_merged() -> None:
    runs = [result(case(1e-3, eager=seconds)) for seconds in (2e-3, 4e-3, 8e-3)]
    others = [run["rows"][0]["alternatives"]["eager"] for run in runs]
    merged = merge([runs])["rows"][0]
    assert merged["alternatives"]["eager"]["ratio"] == statistics.median(other["ratio"] for other in others)
    assert merged["alternatives"]["eager"]["low"] == others[0]["low"]
    assert merged["alternatives"]["eager"]["high"] == others[2]["high"] and merged["alternatives"]["eager"]["noisy"]
    assert merged["roofline"] == pytest.approx((1 << 20) / 1e9 / (merged["ours_ms"] / 1e3))


def test_a_row_that_was_wrong_once_is_wrong() -> None:
    good = result(case(eager=2e-3))
    bad = {**good, "rows": [wrong_row(case(), WrongResult("off by one"))]}
    assert "wrong" in merge([[good, bad, good]])["rows"][0]


def test_rows_are_merged_by_name_and_none_may_be_missing() -> None:
    short, long = case(1e-3, eager=2e-3), case(5e-3, eager=5e-3)
    long.shape = "another"
    merged = merge([[result(short, long), result(long, short)], [result(long)]])
    assert [round(row["alternatives"]["eager"]["ratio"]) for row in merged["rows"]] == [2, 1, 1]
    assert [row["processes"] for row in merged["rows"]] == [2, 2, 1]
    lacking = merge([[result(short, long), result(short)]])["rows"]
    assert "wrong" not in lacking[0] and "only 1 of 2 processes" in lacking[1]["wrong"]


def test_no_row_is_above_what_the_same_rounds_reached() -> None:
    row = merge([[result(case(1e-3, **{"floor: the bytes read": 5e-4, "eager": 1e-4}))]])["rows"][0]
    assert row["roofline"] == pytest.approx(0.5, rel=0.1)  # by the rates alone it would be 1.05


def test_every_row_is_judged_by_the_best_rates_of_all_suites() -> None:
    ops, engine = result(case(eager=2e-3)), result(case(eager=2e-3))
    engine["ceilings"] = Ceilings("cpu", {1 << 20: 2e9, 1 << 28: 1e8}, {"float32": 1e10}).as_dict()
    merged = merge([[ops], [engine]])
    for row in merged["rows"]:
        assert row["roofline"] == pytest.approx((1 << 20) / 2e9 / (row["ours_ms"] / 1e3))
    assert merged["ceilings"]["moved"][1 << 20] == 2e9


def test_floors() -> None:
    assert CEILINGS.bandwidth(1000) == 1e9 and CEILINGS.bandwidth(1 << 28) == CEILINGS.bandwidth(1 << 30) == 1e8
    assert CEILINGS.bandwidth(1 << 24) == pytest.approx((1e9 + 1e8) / 2)  # half way between the exponents
    by_bytes = Ceilings("cpu", {1 << 20: 1e9}, {"float32": 1e10, "int8": 6e10})
    assert by_bytes.floor(Work(1000, 10**9, 3), "float32") == pytest.approx(3e9 / 6e10)
    assert by_bytes.floor(Work(1000, 10**9), "float32") == pytest.approx(0.1)
    assert CEILINGS.floor(Work(1000, 10**9), "float32") == pytest.approx(0.1)
    assert CEILINGS.floor(Work(1 << 30, 1), "float32") == pytest.approx((1 << 30) / 1e8)
    per_token = 2 * (12 + 2 * 2) * 128 * 4 + 128 * 4 + 4 * 8
    assert append_work(workloads.Append(10, "2b", "float32")).bytes == 10 * per_token
    moved = {kept: product_work(workloads.Product(2, "7b", kept)).bytes for kept in KEPT}
    beside, weight = 4 * 2 * (3584 + 18944), 3584 * 18944
    bytes_a_weight = dict(zip(KEPT, (4, 2, 1, 1, 5 / 8), strict=True))
    assert moved == {kept: beside + size * weight for kept, size in bytes_a_weight.items()}


def test_reads_writes_and_copies_have_ceilings_of_their_own() -> None:
    ways = {"read": {1 << 20: 4e9}, "written": {1 << 20: 1e9}, "copied": {1 << 20: 2e9}}
    ceilings = Ceilings("cpu", {1 << 20: 4e9}, {"float32": 1e10}, ways)
    assert ceilings.floor(Work(4_000_000, 0), "float32") == pytest.approx(1e-3)
    assert ceilings.floor(Work(4_000_000, 0, written=2_000_000), "float32") == pytest.approx(2e-3)  # a copy
    assert ceilings.floor(Work(4_000_000, 0, written=1_000_000), "float32") == pytest.approx(1e-3 + 2e-3 / 4)
    assert ceilings.floor(Work(4_000_000, 0, written=4_000_000), "float32") == pytest.approx(4e-3)
    ways["copied"][1 << 20] = 1e9  # slower than its halves one after the other
    assert ceilings.floor(Work(4_000_000, 0, written=2_000_000), "float32") == pytest.approx(0.5e-3 + 2e-3)
    best = Ceilings.best_of(
        [ceilings.as_dict(), Ceilings("cpu", {1 << 20: 5e9}, {}, {"read": {1 << 20: 5e9}}).as_dict()]
    )
    assert best.ways["read"] == {1 << 20: 5e9} and best.ways["copied"] == {1 << 20: 1e9}


def test_everything_is_drawn_and_written(tmp_path: Path) -> None:
    made = merge([[result(case(1e-3, eager=4e-3)), result(case(1e-3, eager=4e-3))]])
    made["environment"] |= {"threads": 2, "torch": "2", "date": "2026-01-01", "transformers": "5", "commit": "c"}
    made["environment"]["capability"] = "AVX2"
    made["rows"].append(wrong_row(case(), WrongResult("off by one")))
    made["rows"][0]["alternatives"]["flash_attn_with_kvcache"] = {"absent": "peer is not installed"}
    for draw in (charts.ratio_bars, charts.roofline):
        for name in ("a.svg", "b.svg"):
            draw(made, tmp_path / name)
        first = (tmp_path / "a.svg").read_bytes()
        assert first.startswith(b"<?xml") and first == (tmp_path / "b.svg").read_bytes()
    for text in (report.markdown(made), report.summary({"here": made}, "results")):
        assert "eager" in text and "wrong" in text
    assert "peer is not installed" in report.markdown(made)
    report.terminal(made)


def test_rows_of_every_operator_have_a_mark_and_a_colour(tmp_path: Path) -> None:
    made = merge([[result(case(1e-3, eager=4e-3))]])
    made["environment"] |= {"threads": 2, "torch": "2", "date": "2026-01-01", "commit": "c", "capability": "AVX2"}
    (row,) = made["rows"]
    rows = (workloads.Append(1, "2b", "float32"), workloads.Product(1, "2b", "float32"))
    operators = [*(one.op for one in rows), "roi_patch_embed", "roi_patches", "control_cross_attention", "decode"]
    made["rows"] = [row | {"op": operator, "work": {"flops": 2, "bytes": 4}} for operator in operators]
    charts.roofline(made, tmp_path / "a.svg")
    assert all(operator in (tmp_path / "a.svg").read_text() for operator in operators)


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    for text in ("", "[]", "{}"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="x.json"):
            report.load(tmp_path / "x.json")
    with pytest.raises(ValueError, match="markers"):
        report.replace_block("no markers", "goals", "block")


def test_goals_are_rows_and_alternatives_that_exist() -> None:
    names = {
        f"{op} | {w.shape} | {w.dtype}"
        for op, group in (
            ("roi_patch_embed", workloads.ROI),
            ("roi_patches", workloads.PATCHES),
            ("control_cross_attention", workloads.CONTROL),
            ("append_visual_kv", workloads.APPEND),
        )
        for w in group
    }
    for workload in workloads.ENGINE["cpu"]:
        op = "decode" if isinstance(workload, workloads.Decode) else "second look"
        names.add(f"{op} | {workload.shape} | float32")
    names |= {f"{name} | host time, {shape} | –" for name, (_, shape) in host.MAKERS.items()}
    for goal in goals.GOALS:
        assert {row.name for row, _ in goal.rows} <= names
        assert goal.against is None or ALTERNATIVES[goal.against.name] is goal.against
    assert {row.name for row in goals.HEADLINE} <= names | {f"drop-in | {w.shape} | {w.dtype}" for w in DROP_IN_IMAGES}


def test_every_alternative_has_one_description() -> None:
    for module in CASES:
        for one in module.ALTERNATIVES:
            assert ALTERNATIVES[one.name].description == one.description


def test_a_missed_goal_is_called_missed() -> None:
    def rows(change: float) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for goal in goals.GOALS:
            for wanted, limit in goal.rows:
                name = wanted.name
                row = found.setdefault(name, {"name": name, "ours_ms": limit / 1e3 / change, "alternatives": {}})
                row["alternatives"][goal.against and goal.against.name] = {"ratio": limit * change}
        return list(found.values())

    good, bad, empty = ({"environment": ENVIRONMENT, "rows": found} for found in (rows(1.01), rows(0.99), []))
    assert "missed" not in goals.table({"a": [good]})
    assert goals.table({"a": [bad]}).count("missed") == sum(len(goal.rows) for goal in goals.GOALS)
    assert "not measured" in goals.table({"a": [empty]}) and "missed" not in goals.table({"a": [empty]})
    assert goals.table({"a": [good, bad]}) == goals.table({"a": [good]})


def test_machines_stand_side_by_side(monkeypatch) -> None:
    goal = goals.GOALS[0]
    monkeypatch.setattr(goals, "GOALS", (goal,))
    wide, narrow = (
        {
            "environment": ENVIRONMENT | {"capability": capability},
            "rows": [{"name": row.name, "alternatives": {goal.against.name: {"ratio": ratio}}} for row, _ in goal.rows],
        }
        for capability, ratio in (("AVX512", 7.0), ("AVX2", 6.0))
    )
    head, _, line, *_ = goals.table({"wide": [wide], "narrow": [narrow]}).splitlines()
    assert head.endswith("| reached, made up, AVX512, 2 threads | reached, made up, AVX2, 2 threads |")
    assert line.endswith("| 7×, 7× | 6×, 6× |")


def test_a_missed_goal_states_its_reason(monkeypatch) -> None:
    goal = goals.GOALS[0]
    row = {"name": goal.rows[0][0].name, "ours_ms": 1.0, "alternatives": {goal.against.name: {"ratio": 0.5}}}
    with pytest.raises(ValueError, match="states no reason"):
        goals.reasons({"a": [{"environment": ENVIRONMENT, "rows": [row]}]})
    monkeypatch.setattr(goals, "GOALS", (dataclasses.replace(goal, reason="It snowed."),))
    both = {name: [{"environment": ENVIRONMENT | {"cpu": name}, "rows": [row]}] for name in ("a", "b")}
    for text in ("512×384", "It snowed.", "(a, AVX2, 2 threads, b, AVX2, 2 threads)"):
        assert text in goals.reasons(both)


def test_an_alternative_says_why_it_cannot_run() -> None:
    def broken(problem: str) -> None:
        raise RuntimeError("another release")

    present = Alternative("a", "", lambda problem: lambda: problem, peer="torch")
    assert present.calls(["first", "second"])[1]() == "second"
    assert Alternative("a", "", broken, peer="no_such_package").calls(["x"]) == "no_such_package is not installed"
    assert Alternative("a", "", broken, lambda problem: f"not {problem}").calls(["x"]) == "not x"
    assert (
        Alternative("a", "", broken, peer="torch").calls(["x"]) == "torch does not run: RuntimeError: another release"
    )
    with pytest.raises(RuntimeError):  # without a peer it is a fault of ours
        Alternative("a", "", broken).calls(["x"])


def test_the_page_to_start_with_checks_and_times(capsys, monkeypatch) -> None:
    import bench.minimal as minimal

    with torch.inference_mode():
        minimal.main(rounds=2)
        assert len(capsys.readouterr().out.splitlines()) == 3
        ours, eager, tolerance = minimal.CALLS[1]
        monkeypatch.setattr(minimal, "CALLS", [(lambda: (ours()[0] * 1.01,), eager, tolerance)])
        with pytest.raises(AssertionError, match="eager_project: the results differ by 1e-02"):
            minimal.main(rounds=2)
    assert not capsys.readouterr().out
    assert len([line for line in Path(minimal.__file__).read_text().splitlines() if line]) <= 60


def test_a_part_never_replaces_a_result() -> None:
    done = CliRunner().invoke(command.app, ["run", "--only", "append"])
    assert done.exit_code == 2 and "--out" in done.output


@pytest.mark.parametrize("page", command.PAGES)
def test_the_pages_show_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert command.with_results(page, text) == text


def test_the_readme_shows_ten_rows_at_most() -> None:
    measured = (ROOT / "README.md").read_text().partition("<!-- headline: begin -->")[2]
    shown = [line for line in measured.partition("<!-- headline: end -->")[0].splitlines() if line.startswith("| ")]
    assert len(shown) - 1 == len(goals.HEADLINE) <= 10


def test_pictures_and_tables_belong_to_the_results() -> None:
    files = [file for file in (ROOT / "bench/results").rglob("*.json") if file.stem in ("quick", "full")]
    assert files
    for file in files:
        loaded = report.load(file)
        assert file.with_suffix(".md").read_text() == scaling.page(loaded)
        pictures = list(file.parent.glob(f"{file.stem}-*.svg"))
        assert len(pictures) >= 4
        for picture in pictures:
            assert f"drawn from result {charts.digest(loaded)}" in picture.read_text(), picture


def test_the_operators_errors_are_the_committed_ones() -> None:
    """Rows of the operators' pages, "case | dtype | ours | PyTorch | largest value", are those of `bench.errors`."""
    measured = (ROOT / "bench/results/amd-epyc-avx512-2-threads/errors.md").read_text().splitlines()
    row = re.compile(r"^\| (\w[\w ]* \| \w+ \| \S+ / \S+ \| \S+ / \S+ \| \S+ \|)$", re.MULTILINE)
    stated = [found for page in (ROOT / "vpt_kernels").glob("*/README.md") for found in row.findall(page.read_text())]
    assert len(stated) == len(measured) - 2
    assert all(any(line.endswith(found) for line in measured) for found in stated)
