"""A run: ceilings by loops of our own, rows that share its time, and what an interrupted one has measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, rows
from bench.budget import Budget, expected_setup, further_processes
from bench.loops import Loops
from bench.rows import measure
from tests.bench.made_up import TIME, Pedantic, case

ROOT = Path(__file__).resolve().parents[2]


def test_the_ceilings_are_above_what_libraries_reach(monkeypatch) -> None:
    monkeypatch.setattr("bench.loops._STEPS", 400_000)
    monkeypatch.setattr("bench.loops._BYTES", 1 << 24)
    loops = Loops.compiled()
    rates, moved = loops.multiplied(1), loops.moved((1 << 16, 1 << 22), 1)
    a = torch.randn(512, 512)
    # Neither may be ten times off, whatever the neighbours do; that loops are not folded away is what this is about.
    begin = time.perf_counter()
    for _ in range(10):
        a @ a
    product = 20 * 512**3 * torch.get_num_threads() ** -1 / (time.perf_counter() - begin)
    assert product / 4 < rates["float32"] < 1e13 and set(moved) == {"read", "written", "copied"}
    assert all(1e8 < rate < 1e13 for way in moved.values() for rate in way.values())


def test_without_a_compiler_the_ceilings_say_so(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(ValueError, match="no-such-compiler is not installed"):
        Loops.compiled()
    monkeypatch.delenv("CXX")
    with pytest.raises(ValueError, match="failed"):
        Loops.compiled(("--no-such-flag",))


def test_a_row_takes_its_share_of_the_time(monkeypatch) -> None:
    monkeypatch.setattr(rows, "clock", lambda device: lambda: TIME.now)
    counts = [measure(case(1e-3, eager=1e-3), Pedantic(), seconds)["rounds"] for seconds in (0.0, 1e3)]
    assert counts == [6, 101]
    budget = Budget(100.0)
    assert budget.share(1) == pytest.approx(100.0, abs=1) and budget.share(4) == pytest.approx(25.0, abs=1)
    assert Budget(-1.0).share(3) == 0.0
    measured = [{"setup_s": 8.0, "sampling_s": 4.0}, {"setup_s": 10.0}]
    assert further_processes(50.0, measured, 9) == 2 and further_processes(50.0, measured, 1) == 1
    assert further_processes(19.0, measured, 2) == 0


def test_another_machine_predicts_by_its_arithmetic() -> None:
    other = {"rows": [{"setup_s": 3.0}, {"setup_s": 4.0}], "ceilings": {"flops": {"float32": 2e11}}}
    assert expected_setup([{"rows": [{}]}, other], 1e11) == 14.0
    assert expected_setup([], 1e11) is None


SUITE = """
import json, pathlib, pytest
from bench import loops
from tests.bench.made_up import case
loops._BYTES, loops._STEPS = 1 << 20, 1000
names = json.loads(pathlib.Path(__file__).with_name("names.json").read_text())

@pytest.mark.parametrize("name", names)
def test_made_up(name, record):
    made = case(1e-3, eager=4e-3)
    made.shape = name
    assert name != "stop", "interrupted"
    record(made)
"""


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Rows are kept as they are measured; a second run measures the missing ones only, and then it is complete."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    results = tmp_path / "results" / "1.json"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "bench.suite.conftest", "-p", "no:cacheprovider"]
    command += [tmp_path / "test_suite.py", f"--rootdir={tmp_path}", "--results", results, "--seconds", "1"]

    def run(*names: str) -> tuple[str, dict[str, Any]]:
        (tmp_path / "names.json").write_text(json.dumps(names))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        return done.stdout, report.load(results)

    output, first = run("a", "b", "stop")
    assert [row["shape"] for row in first["rows"]] == ["a", "b"] and not first["complete"]
    assert "2 of 3" in output and first["rows"][0]["setup_s"] >= 0
    _, second = run("a", "b", "c")
    assert [row["shape"] for row in second["rows"]] == ["a", "b", "c"] and second["complete"]
    assert second["rows"][:2] == first["rows"]
