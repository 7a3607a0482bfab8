"""`python -m bench run | report | compare | traces`."""

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

from bench import goals, scaling
from bench import report as reports
from bench.environment import ROOT, machine
from bench.rows import merge

RESULTS = ROOT / "bench" / "results"
SUITES = sorted((ROOT / "bench" / "suite").glob("test_*.py"))
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
    # A second look takes seconds: one process has to be enough, and its rows say so.
    ops = _measure(rows, [file for file in SUITES if file.stem != "test_engine"], only, processes)
    engine = _measure(rows, [file for file in SUITES if file.stem == "test_engine"], only, 1)
    suites = [runs for runs, _ in (ops, engine) if runs]
    if not suites:
        console.print("no row was measured; see above")
        raise typer.Exit(1)
    result = merge(suites)
    path = (out or RESULTS / machine()) / f"{rows}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(reports.terminal(result))
    console.print(f"saved: {path}")
    raise typer.Exit(int(ops[1] or engine[1]))


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="A machine's results; default: this machine's.")] = None,
    readme: Annotated[bool, typer.Option("--readme", help="Also write the README's numbers and pictures.")] = False,
) -> None:
    """Print a result, and write its Markdown and pictures beside it."""
    from bench import charts

    folder = folder or RESULTS / machine()
    files = sorted(folder.glob("*.json"))
    files = [file for file in files if file.stem in ("quick", "full")]
    if not files:
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
    if readme:
        path = ROOT / "README.md"
        path.write_text(with_results(path.read_text()))


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


def with_results(text: str) -> str:
    """The README's text with the numbers of the committed results."""
    results = committed()
    quick = {machine: found["quick"] for machine, found in results.items() if "quick" in found}
    text = reports.replace_block(text, "measured", reports.readme_block(quick))
    # The goals are for CPUs; there is one such machine.
    on_cpu = [list(results[machine].values()) for machine, found in quick.items() if "gpu" not in found["environment"]]
    return reports.replace_block(text, "goals", goals.table(on_cpu[0]))


if __name__ == "__main__":
    app()
