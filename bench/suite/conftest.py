"""Options and shared state of the benchmark suites: `--rows quick|full`, `--results FILE`, `--seconds N`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.budget import SAMPLING, Budget
from bench.cases import Case, WrongResult
from bench.environment import environment
from bench.rooflines import Ceilings
from bench.rows import measure, wrong_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = pytest.StashKey[list[dict[str, Any]]]()
CEILINGS = pytest.StashKey[Ceilings]()
BEGUN = pytest.StashKey[dict[str, object]]()
BUDGET = pytest.StashKey[Budget | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", choices=("quick", "full"), default="quick", help="which workloads are measured")
    parser.addoption("--results", type=Path, help="JSON file for the rows, written after each; those in it are kept")
    parser.addoption("--weights", default="float32", help="precision in which the engine keeps its weights")
    parser.addoption("--seconds", type=float, help="for all rows; the fewest samples of slow ones may take longer")


def pytest_configure(config: pytest.Config) -> None:
    path, seconds = config.getoption("--results"), config.getoption("--seconds")
    before = report.load(path) if path is not None and path.is_file() else {"rows": []}
    # What was wrong is tried again.
    config.stash[ROWS] = [row for row in before["rows"] if "wrong" not in row]
    config.stash[BEGUN] = before.get("environment") or environment()
    config.stash[CEILINGS] = Ceilings.best_of([before["ceilings"]]) if "ceilings" in before else Ceilings(DEVICE)
    config.stash[BUDGET] = None if seconds is None else Budget(seconds)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    measured = {row["test"] for row in config.stash[ROWS]}
    items[:] = [item for item in items if item.nodeid not in measured]
    if config.getoption("--rows") == "quick":
        items[:] = [item for item in items if getattr(item, "callspec", None) is None or _quick(item)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if len(session.config.stash[ROWS]) and session.config.stash[CEILINGS].flops:
        _measure_ceilings(session.config)
        _save(session.config, complete=session.testsfailed == 0)


def _measure_ceilings(config: pytest.Config) -> None:
    """Raise what was reached before: on a shared machine, a ceiling is what one quiet moment shows."""
    found, now = config.stash[CEILINGS], Ceilings.measure(DEVICE)
    config.stash[CEILINGS] = Ceilings.best_of([one.as_dict() for one in (found, now)])


def _quick(item: Any) -> bool:
    return getattr(item.callspec.params.get("workload"), "quick", True)


def _save(config: pytest.Config, complete: bool = False) -> None:
    path = config.getoption("--results")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "complete": complete,
        "environment": config.stash[BEGUN],
        "ceilings": config.stash[CEILINGS].as_dict(),
        "rows": config.stash[ROWS],
    }
    # Whoever stops a run stops it anywhere: the file is the one before or the one behind this row.
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    # Otherwise the ninth shape of a function would run eagerly under the name of torch.compile.
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def _ceilings(request: pytest.FixtureRequest) -> None:
    _measure_ceilings(request.config)


@pytest.fixture
def weights(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--weights")


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, _ceilings: None) -> Callable[[Case], None]:
    """Measure a case and keep its row; a wrong or failing case becomes a row that says so, and a failure."""
    config, begin = request.config, time.perf_counter()

    def run(case: Case) -> None:
        rows, items, budget = config.stash[ROWS], request.session.items, config.stash[BUDGET]
        seconds = SAMPLING if budget is None else budget.share(len(items) - items.index(request.node))
        try:
            rows.append(measure(case, benchmark, seconds))
        except Exception as error:  # noqa: BLE001  (whatever it was, the row must not vanish)
            rows.append(wrong_row(case, error))
            pytest.fail(rows[-1]["wrong"], pytrace=not isinstance(error, WrongResult))
        finally:
            rows[-1]["test"] = request.node.nodeid
            rows[-1]["setup_s"] = time.perf_counter() - begin - rows[-1].get("sampling_s", 0.0)
            _save(config)
            _say(request, rows[-1])

    return run


def _say(request: pytest.FixtureRequest, row: dict[str, Any]) -> None:
    plugins, items = request.config.pluginmanager, request.session.items
    reporter = plugins.get_plugin("terminalreporter")
    took = row["setup_s"] + row.get("sampling_s", 0.0)
    place = f"{items.index(request.node) + 1} of {len(items)}"
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"{place}, {took:.1f} s: {row['name']}: {report.in_a_line(row)}")
