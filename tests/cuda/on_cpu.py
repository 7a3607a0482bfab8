"""The CUDA backend on CPU tensors: its sources, host code and kernels, compiled by g++ over `cuda_on_cpu.h`.

As a pytest plugin (`-p tests.cuda.on_cpu` with VPT_TEST_BACKENDS=cuda) it makes backend="cuda" run that build, so that
the tests of the operators can be pointed at it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from vpt_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
HERE, SOURCES, CACHE = ROOT / "tests/cuda", ROOT / "csrc", ROOT / "build/cuda_on_cpu"
TORCH = Path(torch.__file__).parent
# The kernels are held to the GPU's arithmetic: nothing is contracted but what asks for it by name.
FLAGS = ["-O2", "-std=c++20", "-fPIC", "-w", "-fvisibility=hidden", "-ffp-contract=off", "-march=native"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}", f"-I{SOURCES}"]
LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]


def _sources() -> list[Path]:
    return [*sorted((SOURCES / "cuda").glob("*.cu")), SOURCES / "cuda/register.cpp", HERE / "launches.cpp"]


def _included(file: Path, found: set[Path]) -> set[Path]:
    """The files of this repository that `file` includes, and those that they include."""
    for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
        for path in ((file.parent / name).resolve(), SOURCES / name):
            if path.is_file() and path not in found:
                found.add(path)
                _included(path, found)
    return found


def digest(*files: Path, extra: object = "") -> str:
    """A name for the contents of the files and of what they include, for torch's version, and for `extra`."""
    found = hashlib.sha256(repr((torch.__version__, extra)).encode())
    every = set(files)
    for file in files:
        _included(file, every)
    for file in sorted(every):
        found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()[:20]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a compiler; raise with its words if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


def _compile(source: Path) -> Path:
    shim = HERE / "cuda_on_cpu.h"
    target = CACHE / f"{source.stem}-{digest(source, shim, extra=FLAGS)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        run(os.environ.get("CXX", "g++"), *FLAGS, "-include", shim, "-x", "c++", "-c", source, "-o", partial)
        partial.rename(target)
    return target


def build() -> Path:
    """The library; only what changed since it was last built is compiled."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(_compile, _sources()))
    library = CACHE / f"cuda-{hashlib.sha256(repr(objects).encode()).hexdigest()[:20]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        run(os.environ.get("CXX", "g++"), "-shared", *objects, "-o", partial, *LIBRARIES)
        partial.rename(library)
    return library


@cache
def load() -> ctypes.CDLL:
    """Register the build for CPU tensors and let backend="cuda" take them; the library, for its counters."""
    library = build()
    torch.ops.load_library(library)
    choose = backends._choose

    def on_cpu(operator, backend, device, dtype, declined):
        if backend != "cuda":
            return choose(operator, backend, device, dtype, declined)
        row = backends.CAPABILITIES[operator]["cuda"]
        if "cuda" in declined or dtype not in row.dtypes or device.type != "cpu":
            raise backends.BackendUnavailable(f"{operator}: cuda: {declined.get('cuda', (dtype, row.dtypes, device))}")
        return "cuda"

    backends._choose = on_cpu
    found = ctypes.CDLL(str(library))
    found.vpt_launched.restype = ctypes.c_char_p
    found.vpt_launches.restype = found.vpt_chained_launches.restype = ctypes.c_int64
    return found


def pytest_configure() -> None:
    load()
