"""Every instruction set's inner loops against the plain C++ ones, in a program of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.helpers import SEED

ROOT = Path(__file__).resolve().parents[2]


def test_instruction_sets_agree(tmp_path: Path) -> None:
    sources = [ROOT / "tests/native/simd_check.cpp", *(ROOT / "csrc/cpu").glob("simd_*.cpp")]
    program = tmp_path / "simd_check"
    flags = ["-O2", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-w"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program), str(SEED)], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert lines and all(line.endswith(" ok") for line in lines), f"seed {SEED}: {lines} {result.stderr}"
