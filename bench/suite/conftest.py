"""Options and shared state of the benchmark suites: `--rows quick|full`, `--results FILE`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case, WrongResult
from bench.environment import environment
from bench.rooflines import Ceilings
from bench.rows import measure, wrong_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = pytest.StashKey[list[dict[str, Any]]]()
CEILINGS = pytest.StashKey[Ceilings]()
BEGUN = pytest.StashKey[dict[str, object]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", choices=("quick", "full"), default="quick", help="which workloads are measured")
    parser.addoption("--results", type=Path, help="JSON file for the rows, written after each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[BEGUN] = environment()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--rows") == "quick":
        items[:] = [item for item in items if getattr(item, "callspec", None) is None or _quick(item)]


def _quick(item: Any) -> bool:
    return getattr(item.callspec.params.get("workload"), "quick", True)


def _save(config: pytest.Config) -> None:
    path = config.getoption("--results")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": config.stash[BEGUN],
        "ceilings": config.stash[CEILINGS].as_dict(),
        "rows": config.stash[ROWS],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    # Otherwise the ninth shape of a function would run eagerly under the name of torch.compile.
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def _ceilings(request: pytest.FixtureRequest) -> None:
    request.config.stash[CEILINGS] = Ceilings.measure(DEVICE)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, _ceilings: None) -> Callable[[Case], None]:
    """Measures a case and keeps its row; a wrong or failing case becomes a row that says so, and a failure."""

    def run(case: Case) -> None:
        rows = request.config.stash[ROWS]
        try:
            rows.append(measure(case, benchmark))
        except Exception as error:  # noqa: BLE001  (whatever it was, the row must not vanish)
            rows.append(wrong_row(case, error))
            pytest.fail(rows[-1]["wrong"], pytrace=not isinstance(error, WrongResult))
        finally:
            _save(request.config)

    return run
