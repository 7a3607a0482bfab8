"""NEAREST indices one by one against the whole walk, in a program of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.helpers import SEED

ROOT = Path(__file__).resolve().parents[2]


def test_jumps_equal_steps(tmp_path: Path) -> None:
    program = tmp_path / "nearest_check"
    source = ROOT / "tests/native/nearest_check.cpp"
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-w"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(program)], check=True)
    seed = str(SEED % 2**31)
    result = subprocess.run([str(program), seed], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"seed {SEED}: {result.stdout}{result.stderr}"
