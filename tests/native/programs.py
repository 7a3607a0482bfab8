"""The C++ programs of this folder, compiled for this machine or another."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE, SOURCES, TORCH = ROOT / "tests/native", ROOT / "csrc/cpu", Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-w"]
COMPILER = os.environ.get("CXX", "c++")
LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}", "-rdynamic"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}"]
PROGRAMS = {
    # name: sources and flags beside its own
    "nearest_check": [],
    "staging_check": [],
    "simd_check": sorted(SOURCES.glob("simd_*.cpp")),
    "threads_check": [*sorted(SOURCES.glob("*.cpp")), *STABLE_ABI, *LIBRARIES],
}


def compile_program(name: str, folder: Path, *flags: str, compiler: str = COMPILER) -> Path:
    """Compile a program of this folder; raise CalledProcessError, with the compiler's words on stderr, if it cannot."""
    program = folder / name
    sources = [HERE / f"{name}.cpp", *PROGRAMS[name]]
    subprocess.run([compiler, "-O2", *FLAGS, *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def run_program(
    program: Path, seed: int, *arguments: str, emulator: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [*emulator, str(program), str(seed % 2**31), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
