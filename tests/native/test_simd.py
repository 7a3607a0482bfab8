"""Every instruction set's inner loops against the plain C++ ones, in a program of their own."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import SEED
from tests.native.programs import compile_program, run_program


def test_instruction_sets_agree(tmp_path: Path) -> None:
    result = run_program(compile_program("simd_check", tmp_path), SEED)
    lines = result.stdout.splitlines()
    assert lines and all(line.endswith((" ok", " not on this processor")) for line in lines), (
        f"seed {SEED}: {lines} {result.stderr}"
    )
    assert "generic ok" in lines
