"""`python -m bench run | report | compare | launches | load | traces`."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import goals, scaling, site
from bench import report as reports
from bench.budget import expected_setup, further_processes
from bench.environment import ROOT, commit, machine
from bench.gpu import report as gpu_report
from bench.loops import Loops
from bench.rows import merge
from vpt_model.network.state import PRECISIONS

RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/results.md")
SUITES = sorted((ROOT / "bench" / "suite").glob("test_*.py"))
SLOW = ("test_engine", "test_live", "test_chat")
OPERATORS = 0.4
"""Of the time, for the operators' first process; of what is then left, for their further ones."""
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
# Wide enough for every column where the output is a file.
console = Console(width=None if sys.stdout.isatty() else 200)


def _measure(
    rows: str, files: list[Path], only: str, path: Path, seconds: float, weights: str
) -> tuple[reports.Result | None, bool]:
    """Return what a fresh process measured, None if `only` picks nothing, and whether anything was wrong.

    path: where it writes each row as it is measured, and finds those that a run before it has measured. seconds: for
    the rows that are still to be measured.
    """
    if path.is_file() and (found := reports.load(path))["complete"]:
        return found, False
    options = ["--rows", rows, "-p", "no:cacheprovider", "--benchmark-quiet", "--no-header", "-q"]
    command = [sys.executable, "-m", "pytest", *files, *options, "--results", path, "--seconds", max(0.0, seconds)]
    command += ["--weights", weights]
    command += ["-k", only] if only else []
    status = subprocess.run(list(map(str, command)), cwd=ROOT, check=False).returncode
    nothing = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return reports.load(path) if path.is_file() else None, status not in nothing


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="mini or 2b-slice.")] = "mini",
    requests: Annotated[int, typer.Option(min=8, help="Requests of each load.")] = 128,
    soak: Annotated[int, typer.Option(min=0, help="Requests of the endurance run, of which a fifth goes away.")] = 1000,
    parallel: Annotated[int, typer.Option(min=1, help="Engines side by side, behind the server of one.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = ROOT / "build" / "serving",
) -> None:
    """Put vLLM with second looks under load; in an environment that has vLLM (`make bench-serve` makes one for a CPU).

    Every figure is kept as soon as it is measured: the same command goes on where an interrupted one stopped.
    """
    from bench import serve as serving  # its clients are needed here alone

    if model not in ("mini", "2b-slice"):
        raise typer.BadParameter(f"model is {model!r}; give mini or 2b-slice")
    path = out / f"{model}-{machine()}.json"
    found = serving.measure(model, requests, soak, sorted({1, parallel}), path)
    for engines, rows in found["servers"].items():
        table = Table("load", *next(iter(rows.values())), title=f"{model}, data parallel {engines}")
        for name, row in rows.items():
            table.add_row(name, *("" if value is None else str(value) for value in row.values()))
        console.print(table)
    console.print(found.get("soak", ""), found["engine"], path)


@app.command()
def run(
    full: Annotated[bool, typer.Option("--full", help="All workloads, not only the quick ones.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default bench/results/<machine>.")] = None,
    only: Annotated[str, typer.Option(help="A pytest -k expression that picks rows.")] = "",
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes at most, whose rows are merged.")] = 3,
    minutes: Annotated[float | None, typer.Option(min=0, help="For the whole run; default 5, with --full 40.")] = None,
    weights: Annotated[
        str, typer.Option(help=f"Precision in which the engine keeps its weights: {', '.join(PRECISIONS[1:])}.")
    ] = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted run has measured.")] = False,
) -> None:
    """Measure, print and save; the exit status is 1 if a result was wrong.

    Every row is kept as soon as it is measured: the same command goes on where an interrupted one stopped, as long as
    neither code nor machine has changed.
    """
    if only and out is None:
        raise typer.BadParameter("--only measures a part, which must not replace a whole result: give --out as well")
    if weights not in PRECISIONS[1:]:
        raise typer.BadParameter(f"--weights {weights}: it must be one of {', '.join(PRECISIONS[1:])}")
    if weights != "float32" and out is None:
        raise typer.BadParameter("--weights measures other rows than those of float32: give --out as well")
    rows, begin = "full" if full else "quick", time.monotonic()
    seconds = 60 * (minutes if minutes is not None else 40 if full else 5)
    kept = _kept(rows, only, weights)
    if fresh:
        shutil.rmtree(kept, ignore_errors=True)
    _announce(rows, only, seconds, kept)
    # A look or a turn takes seconds: one process has to be enough, and its rows say so.
    fast, slow = ([file for file in SUITES if (file.stem in SLOW) == is_slow] for is_slow in (False, True))
    first = _measure(rows, fast, only, kept / "operators-1.json", seconds * OPERATORS, weights)
    left = begin + seconds - time.monotonic()
    looks = _measure(rows, slow, only, kept / "engine-1.json", left * (1 - OPERATORS), weights)
    ops = [first]
    while ops[-1][0] and len(ops) < processes:
        left = begin + seconds - time.monotonic()
        more = further_processes(left, ops[0][0]["rows"], processes - len(ops))
        if not more:
            console.print(f"{len(ops)} of {processes} processes: no more fit into the time")
            break
        ops.append(_measure(rows, fast, only, kept / f"operators-{len(ops) + 1}.json", left / more, weights))
    suites = [found for runs in (ops, [looks]) if (found := [result for result, _ in runs if result])]
    if not suites:
        console.print("no row was measured; see above")
        raise typer.Exit(1)
    result = merge(suites)
    path = (out or RESULTS / machine()) / f"{rows}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(reports.terminal(result))
    failed = any(wrong for _, wrong in (*ops, looks))
    if not failed:
        shutil.rmtree(kept, ignore_errors=True)
    console.print(f"saved: {path}, after {(time.monotonic() - begin) / 60:.1f} minutes")
    raise typer.Exit(int(failed))


def _kept(*what: str) -> Path:
    """Return where a run's processes write; a run of the same rows of the same code on the same machine finds it
    again.
    """
    of = [*what, machine(), commit(), torch.__version__]
    return ROOT / "build" / "bench" / hashlib.sha256("\n".join(of).encode()).hexdigest()[:12]


def _announce(rows: str, only: str, seconds: float, kept: Path) -> None:
    """Say how long the run will take, and what is measured already."""
    known = [RESULTS / machine() / f"{rows}.json", *sorted(RESULTS.glob(f"*/{rows}.json"))]
    setup = None
    if not torch.cuda.is_available() and not only:
        flops = Loops.compiled().multiplied(torch.get_num_threads())["float32"]
        setup = expected_setup((reports.load(file) for file in known if file.is_file()), flops)
    # A tenth of its set-up is the least that a row's samples take.
    expected = seconds if setup is None else max(seconds, 1.1 * setup)
    console.print(
        f"about {expected / 60:.0f} minutes for the {rows} rows"
        + ("" if setup is None else f", {setup / 60:.1f} of them to build and check what is timed")
        + ("" if expected <= seconds else f": this machine needs more than the {seconds / 60:.0f} that are asked for")
    )
    if done := [row for file in sorted(kept.glob("*.json")) for row in reports.load(file)["rows"]]:
        console.print(f"{len(done)} measurements of an interrupted run are kept; --fresh forgets them")


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="A machine's results; default: this machine's.")] = None,
    pages: Annotated[
        bool, typer.Option("--pages", help="Also write the numbers of README.md and docs/results.md.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Only write the committed results of all machines into this one HTML file.")
    ] = None,
) -> None:
    """Print a result, and write its Markdown and pictures beside it."""
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(
            site.page(committed(), {p.parent.name: gpu_report.load(p) for p in RESULTS.glob("*/results.jsonl")})
        )
        console.print(f"saved: {html}")
        return
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
    found = {name: {what: counted.totals(tally) for what, tally in rows.items()} for name, rows in tallies.items()}
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
def load(
    people: Annotated[int, typer.Option(min=1, help="Visitors of the page at once.")] = 8,
    questions: Annotated[int, typer.Option(min=20, help="Asked by all of them together.")] = 200,
) -> None:
    """Let several people ask vpt-mini on `vpt app`; the exit status is 1 if anything went wrong."""
    from bench.load import measure

    found = measure(people, questions)
    for line in found.lines():
        console.print(line)
    raise typer.Exit(int(bool(found.problems)))


@app.command()
def traces(folder: Annotated[Path, typer.Argument(help="Where the set is written.")]) -> None:
    """Write our operators as FlashInfer Trace definitions and workloads."""
    from bench.traces import write

    for path in write(folder):
        console.print(str(path))


def committed() -> dict[str, dict[str, reports.Result]]:
    """Return the results of every machine under bench/results, "quick" and, where it was measured, "full"."""
    found: dict[str, dict[str, reports.Result]] = {}
    for name in ("quick", "full"):
        for file in sorted(RESULTS.glob(f"*/{name}.json")):
            found.setdefault(file.parent.name, {})[name] = reports.load(file)
    return found


def with_results(page: str, text: str) -> str:
    """Return the text of a page with the numbers of the committed results in its blocks.

    page: "README.md" or "docs/results.md".
    """
    results = committed()
    quick = {machine: found["quick"] for machine, found in results.items() if "quick" in found}
    # The goals are for CPUs.
    on_cpu = {
        machine: list(results[machine].values())
        for machine, found in quick.items()
        if "gpu" not in found["environment"]
    }
    headline = {row.name for row in goals.HEADLINE}
    blocks = {
        "README.md": {"headline": lambda: reports.summary(quick, "bench/results", headline)},
        "docs/results.md": {
            "measured": lambda: reports.summary(quick, "../bench/results"),
            "goals": lambda: goals.table(on_cpu),
            "misses": lambda: goals.reasons(on_cpu),
        },
    }
    for name, block in blocks[page].items():
        text = reports.replace_block(text, name, block())
    return text


if __name__ == "__main__":
    app()
