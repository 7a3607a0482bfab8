"""Every instruction set's inner loops against the plain C++ ones, in a program of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.helpers import SEED, require
from tests.native.programs import ROOT, compile_program, run_program


def test_instruction_sets_agree(tmp_path: Path) -> None:
    result = run_program(compile_program("simd_check", tmp_path), SEED)
    lines = result.stdout.splitlines()
    assert lines and all(line.endswith((" ok", " not on this processor")) for line in lines), (
        f"seed {SEED}: {lines} {result.stderr}"
    )
    assert "generic ok" in lines


def test_the_library_has_no_mmx_instruction() -> None:
    """Compilers use these registers unasked and without EMMS, and then the process's next long doubles are NaN."""
    require("ninja", None if shutil.which("objdump") else "objdump, which comes with every compiler, is missing")
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", ROOT / "vpt_kernels/_C.so"], capture_output=True, text=True, check=True
    ).stdout
    assert len(code) > 1e6
    assert not re.findall(r".*%mm[0-7].*", code)
