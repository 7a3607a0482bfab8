"""NEAREST indices one by one against the whole walk, in a program of its own."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import SEED
from tests.native.programs import compile_program, run_program


def test_jumps_equal_steps(tmp_path: Path) -> None:
    result = run_program(compile_program("nearest_check", tmp_path), SEED)
    assert result.returncode == 0, f"seed {SEED}: {result.stdout}{result.stderr}"
