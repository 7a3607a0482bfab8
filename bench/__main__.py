"""`python -m bench run | report | compare | launches | traces`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console
from rich.table import Table

from bench import goals, scaling
from bench import report as reports
from bench.environment import ROOT, machine
from bench.gpu import report as gpu_report
from bench.rows import merge

RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/results.md")
SUITES = sorted((ROOT / "bench" / "suite").glob("test_*.py"))
SLOW = ("test_engine", "test_live", "test_chat")
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
# Wide enough for every column where the output is a file.
console = Console(width=None if sys.stdout.isatty() else 200)


def _measure(rows: str, files: list[Path], only: str, processes: int) -> tuple[list[reports.Result], bool]:
    """The results of several fresh processes, empty if `only` picks nothing, and whether anything was wrong."""
    found, failed = [], False
    options = ["--rows", rows, "-p", "no:cacheprovider", "--benchmark-quiet", "--no-header", "-q"]
    with tempfile.TemporaryDirectory(prefix="vpt-bench-") as folder:
        for number in range(processes):
            path = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "pytest", *files, *options, "--results", path]
            command += ["-k", only] if only else []
            console.print(f"process {number + 1} of {processes}: {', '.join(file.stem for file in files)}")
            status = subprocess.run(list(map(str, command)), cwd=ROOT, check=False).returncode
            if status == pytest.ExitCode.NO_TESTS_COLLECTED:
                break
            failed |= status != 0
            if path.is_file():
                found.append(reports.load(path))
    return found, failed


@app.command()
def run(
    full: Annotated[bool, typer.Option("--full", help="All workloads, not only the quick ones.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default bench/results/<machine>.")] = None,
    only: Annotated[str, typer.Option(help="A pytest -k expression that picks rows.")] = "",
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes whose rows are merged.")] = 3,
) -> None:
    """Measure, print and save; the exit status is 1 if a result was wrong."""
    if only and out is None:
        raise typer.BadParameter("--only measures a part, which must not replace a whole result: give --out as well")
    rows = "full" if full else "quick"
    # A look or a turn takes seconds: one process has to be enough, and its rows say so.
    ops = _measure(rows, [file for file in SUITES if file.stem not in SLOW], only, processes)
    slow = _measure(rows, [file for file in SUITES if file.stem in SLOW], only, 1)
    suites = [runs for runs, _ in (ops, slow) if runs]
    if not suites:
        console.print("no row was measured; see above")
        raise typer.Exit(1)
    result = merge(suites)
    path = (out or RESULTS / machine()) / f"{rows}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(reports.terminal(result))
    console.print(f"saved: {path}")
    raise typer.Exit(int(ops[1] or slow[1]))


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="A machine's results; default: this machine's.")] = None,
    pages: Annotated[
        bool, typer.Option("--pages", help="Also write the numbers of README.md and docs/results.md.")
    ] = False,
) -> None:
    """Print a result, and write its Markdown and pictures beside it."""
    from bench import charts

    folder = folder or RESULTS / machine()
    files = sorted(folder.glob("*.json"))
    files = [file for file in files if file.stem in ("quick", "full")]
    if (lines := folder / "results.jsonl").exists():
        found = gpu_report.load(lines)
        (folder / "gpu.md").write_text(gpu_report.page(found))
        charts.targets(gpu_report.targets(found), gpu_report.where(found), folder / "gpu-targets.svg")
        console.print(gpu_report.page(found))
    elif not files:
        console.print(f"no results in {folder}; run `python -m bench run` first")
        raise typer.Exit(1)
    for file in files:
        result = reports.load(file)
        console.print(reports.terminal(result))
        file.with_suffix(".md").write_text(scaling.page(result))
        charts.ratio_bars(result, folder / f"{file.stem}-ratios.svg")
        charts.ratio_bars(result, folder / f"{file.stem}-strongest.svg", every=False)
        charts.roofline(result, folder / f"{file.stem}-roofline.svg")
        charts.timeline(result, folder / f"{file.stem}-second-look.svg")
        charts.scaling(result, folder / f"{file.stem}-scaling.svg")
    for page in PAGES if pages else ():
        path = ROOT / page
        path.write_text(with_results(page, path.read_text()))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A result file.")],
    after: Annotated[Path, typer.Argument(help="A later one, of the same machine.")],
    threshold: Annotated[float, typer.Option(help="How much slower is a failure.")] = reports.SLOWDOWN,
) -> None:
    """Exit with 1 where a row became slower, and the whole 95 % interval says so."""
    table, failures, overlap = reports.compare(reports.load(before), reports.load(after), threshold)
    console.print(table)
    console.print(f"intervals of the same row overlap in {overlap:.0%} of the rows")
    console.print(f"slower, wrong or missing: {', '.join(failures)}" if failures else "nothing became slower")
    raise typer.Exit(int(bool(failures)))


@app.command()
def launches(
    as_json: Annotated[bool, typer.Option("--json", help="Every number, and the kernels by name.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Make these the budgets and docs/launches.md.")] = False,
    preset: Annotated[list[str] | None, typer.Option(help="Default: 2b and 7b.")] = None,
) -> None:
    """Count, without a GPU, what the engine asks of one."""
    from bench import launches as counted
    from bench.launches.counts import PRESETS_COUNTED, counts

    if write and preset:
        raise typer.BadParameter("--write replaces the budgets of every preset: leave --preset out")
    tallies = {name: counts(name) for name in preset or PRESETS_COUNTED}
    found = {name: {what: counted.numbers(tally) for what, tally in rows.items()} for name, rows in tallies.items()}
    if write:
        counted.write(found)
    if as_json:
        by_name = {
            name: {
                what: found[name][what] | {"by name": dict(tally.launches.most_common())}
                for what, tally in rows.items()
            }
            for name, rows in tallies.items()
        }
        print(json.dumps(by_name, indent=1))
        return
    for name, rows in found.items():
        table = Table("", *counted.COLUMNS.values(), title=name.upper())
        for what, row in rows.items():
            table.add_row(what, *(f"{number:,}" for number in row.values()))
        console.print(table)


@app.command()
def traces(folder: Annotated[Path, typer.Argument(help="Where the set is written.")]) -> None:
    """Write our operators as FlashInfer Trace definitions and workloads."""
    from bench.traces import write

    for path in write(folder):
        console.print(str(path))


def committed() -> dict[str, dict[str, reports.Result]]:
    """The results of every machine under bench/results, "quick" and, where it was measured, "full"."""
    found: dict[str, dict[str, reports.Result]] = {}
    for name in ("quick", "full"):
        for file in sorted(RESULTS.glob(f"*/{name}.json")):
            found.setdefault(file.parent.name, {})[name] = reports.load(file)
    return found


def with_results(page: str, text: str) -> str:
    """The text of a page with the numbers of the committed results in its blocks.

    page: "README.md" or "docs/results.md".
    """
    results = committed()
    quick = {machine: found["quick"] for machine, found in results.items() if "quick" in found}
    # The goals are for CPUs; there is one such machine.
    on_cpu = [list(results[machine].values()) for machine, found in quick.items() if "gpu" not in found["environment"]]
    headline = {row.name for row in goals.HEADLINE}
    blocks = {
        "README.md": {"headline": lambda: reports.summary(quick, "bench/results", headline)},
        "docs/results.md": {
            "measured": lambda: reports.summary(quick, "../bench/results"),
            "goals": lambda: goals.table(on_cpu[0]),
            "misses": lambda: goals.reasons(on_cpu[0]),
        },
    }
    for name, block in blocks[page].items():
        text = reports.replace_block(text, name, block())
    return text


if __name__ == "__main__":
    app()
