"""The CUDA sources, compiled ahead of time for every target and linked; results are kept by the sources' hash."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import setup
from tests.cuda.on_cpu import ROOT, SOURCES, TORCH, digest, run
from tests.helpers import require
from vpt_kernels.toolkit import toolkit_of

CACHE = ROOT / "build/cuda_ahead_of_time"
TARGETS = tuple(re.findall(r"code=(sm_\w+)", " ".join(setup.CUDA_TARGETS)))
# One target after the other, so that the reports of two do not mix.
NVCC_FLAGS = [*(flag for flag in setup.NVCC_FLAGS if flag != "--threads=2"), "-Xcompiler=-fPIC"]
FROM_TORCH_CUDA = ("aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg")
"""What the sources ask of libtorch_cuda, which a CPU build of torch does not have (torch 2.11 and later)."""
INSTALLED = TORCH / "lib/libtorch_cuda.so"
"""That of the installed torch; a CPU build has none."""
INCLUDES = [f"-I{TORCH / 'include'}"]


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel on one target; bytes but for the registers."""

    kernel: str  # demangled, without its parameters
    target: str
    registers: int
    stack: int
    spills: int
    shared: int


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    require("nvcc", None if found else "there is no nvcc on PATH or in /usr/local/cuda/bin")
    return found


def cuobjdump() -> str:
    """NVIDIA's disassembler, as Triton brings it."""
    found = importlib.util.find_spec("triton")
    require("triton", None if found else "triton, which brings cuobjdump, is not installed")
    return str(Path(found.origin).parent / "backends/nvidia/bin/cuobjdump")


def sources() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


def _reports(log: str) -> Iterator[Usage]:
    pattern = (
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    found = re.findall(pattern, log, re.DOTALL)
    names = run("c++filt", *[row[0] for row in found]).stdout.splitlines() if found else []
    for name, (_, target, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernel = re.sub(r"^void |\(.*", "", name).replace("vpt::cuda::", "").replace("vpt::", "")
        yield Usage(
            kernel, target, int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0
        )


def _compile(source: Path) -> tuple[Path, list[Usage]]:
    flags = [*NVCC_FLAGS, *setup.CUDA_TARGETS, "-Xptxas=-v"]
    target = CACHE / f"{source.stem}-{digest(source, extra=flags)}.o"
    report = target.with_suffix(".json")
    if not report.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        done = run(nvcc(), *flags, *INCLUDES, "-c", source, "-o", partial)
        partial.rename(target)
        report.write_text(json.dumps([asdict(usage) for usage in _reports(done.stderr)]))
    return target, [Usage(**row) for row in json.loads(report.read_text())]


@cache
def compiled() -> dict[str, tuple[Path, list[Usage]]]:
    """Object file and resource reports of every source, by its stem."""
    nvcc()
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((s.stem for s in sources()), pool.map(_compile, sources()), strict=True))


def stub(folder: Path, functions: tuple[str, ...] = FROM_TORCH_CUDA) -> Path:
    """A library that calls itself libtorch_cuda.so and whose functions report a failure."""
    source, target = folder / "stub.cpp", folder / "libtorch_cuda.so"
    source.write_text("".join(f'extern "C" int {name}() {{ return 1; }}\n' for name in functions))
    run(os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-Wl,-soname=libtorch_cuda.so", source, "-o", target)
    return target


def torch_cuda() -> Path:
    """libtorch_cuda.so of the installed torch, or in its place the stub."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return INSTALLED if INSTALLED.exists() else stub(CACHE)


@cache
def library() -> Path:
    """All of csrc/cuda as `_C_cuda.so`, linked as setup.py links it, but for the CUDA runtime, which is inside.

    The linker is told to drop libraries that it thinks are not needed, as some distributions' compilers do, and to fail
    on a symbol that no library has.
    """
    objects = [path for path, _ in compiled().values()]
    register, flags = SOURCES / "cuda/register.cpp", setup.CUDA_LINK_FLAGS
    target = CACHE / f"cuda-{digest(register, extra=[flags, *(o.name for o in objects)])}.so"
    if not target.exists():
        partial, toolkit = target.with_suffix(f".{os.getpid()}"), toolkit_of(Path(nvcc()))
        compiler = [os.environ.get("CXX", "g++"), *setup.CXX_FLAGS, "-DUSE_CUDA", "-fPIC", "-shared"]
        linker = ["-Wl,--as-needed", "-Wl,-z,defs", f"-L{torch_cuda().parent}", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
        inputs = [*INCLUDES, f"-I{toolkit / 'include'}", register, *objects]
        run(*compiler, *inputs, *linker, toolkit / "lib64/libcudart_static.a", *flags, "-o", partial)
        partial.rename(target)
    return target


def sass(source: str, target: str) -> dict[str, str]:
    """The machine code of every kernel of a source, by demangled name."""
    command = [cuobjdump(), "-sass", "-arch", target, str(compiled()[source][0])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"\t\tFunction : (\w+)\n", text)
    names = run("c++filt", *parts[0::2]).stdout.splitlines()
    return {
        re.sub(r"^void |\(.*", "", name).replace("vpt::cuda::", "").replace("vpt::", ""): body
        for name, body in zip(names, parts[1::2], strict=True)
    }


if __name__ == "__main__":
    # `python -m tests.cuda.nvcc FILE` writes the library to FILE, for a machine with a GPU and without nvcc.
    print(shutil.copy(library(), sys.argv[1]))
