"""Source rows brought by 16 bytes: every byte, none beside them, whatever the alignment; in a program of its own."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import SEED
from tests.native.programs import compile_program, run_program

SANITIZED = ("-fsanitize=address,alignment", "-fno-sanitize-recover=all")


def test_rows_are_brought_whole_and_nothing_else_is_read(tmp_path: Path) -> None:
    result = run_program(compile_program("staging_check", tmp_path, *SANITIZED), SEED)
    assert result.returncode == 0, f"seed {SEED}: {result.stdout}{result.stderr}"
