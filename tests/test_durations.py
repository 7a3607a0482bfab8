"""Which cases of long functions `make test` leaves out, and how the record of them is made."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import durations

ROOT = Path(__file__).resolve().parents[1]
LOG = """
============================= slowest durations ==============================
2.50s call     tests/a.py::test_many[x - 1]
0.50s setup    tests/a.py::test_many[x - 1]
1.00s call     tests/a.py::test_many[x - 2]
1.90s call     tests/a.py::test_quick
= 3 passed in 9.00s =
============================= slowest durations ==============================
7.00s call     tests/b.py::test_one
============================= slowest durations ==============================
8.00s call     tests/a.py::test_many[x - 3]
"""


@pytest.fixture
def record(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(durations, "RECORD", tmp_path / "durations.txt")
    return durations.RECORD


def items(*names: str) -> list:
    return [SimpleNamespace(nodeid=name) for name in names]


def test_the_log_of_several_runs_becomes_one_record(record, tmp_path):
    (tmp_path / "log").write_text(LOG)
    durations.main(str(tmp_path / "log"))
    assert record.read_text() == "compiled 12.0 3 tests/a.py::test_many\ninterpreted 7.0 1 tests/b.py::test_one\n"
    assert durations.recorded("compiled") == {"tests/a.py::test_many": 4.0}


@pytest.mark.parametrize("shares, kept", [(1, [0]), (1.01, []), (1 / 3, [0, 3, 6]), (0.1, list(range(10)))])
def test_cases_that_stay_are_spread_and_take_no_longer_than_their_share(record, shares, kept):
    record.write_text(f"compiled {100 * shares * durations.SHARE} 100 tests/a.py::test_many\n")
    found = items(*(f"tests/a.py::test_many[{index}]" for index in range(10)), "tests/a.py::test_many_others")
    left = durations.long(found, "compiled")
    assert [index for index in range(10) if found[index] not in left] == kept and found[10] not in left
    assert durations.long(found, "interpreted") == []


def test_what_was_recorded_is_still_there():
    """A function that was renamed would come back whole into `make test`."""
    for mode in durations.MODES:
        for name in durations.recorded(mode):
            path, function = name.split("::", 1)
            assert re.search(rf"def {function.split('::')[-1]}\b", (ROOT / path).read_text()), name


@pytest.mark.parametrize("target", ["test", "test-long"])
def test_every_case_has_a_target(target):
    """What the one leaves out the other runs, and nobody leaves out both."""
    makefile = (ROOT / "Makefile").read_text()
    marks = {"test": r"^TESTS \?= (.*)$", "test-long": r'^\t\$\(MAKE\) -s test TESTS="(.*)"$'}
    said = re.search(marks[target], makefile, flags=re.MULTILINE)[1]
    runs = [eval(said, {}, {"gpu": False, "slow": False, "long": mark}) for mark in (False, True)]
    assert runs == [target == "test", target == "test-long"]
    assert f"make {target}\n" in (ROOT / ".ci" / "run").read_text()
