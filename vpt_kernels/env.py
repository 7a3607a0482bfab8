"""What this machine has, what is missing, and how to get it: `python -m vpt_kernels.env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

import torch

import vpt_kernels
from vpt_kernels.backends import CUDA_EXTENSION_PROBLEM, EXTENSION_PROBLEM
from vpt_kernels.toolkit import cuda_home, nvcc_version, toolkit_problem, trial_problem

_REBUILD = (
    "rebuild: pip install --no-build-isolation --no-binary vpt-kernels --force-reinstall --no-deps vpt-kernels, "
    "or `-e .` in a checkout"
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _tool(name: str, *arguments: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found"
    result = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    lines = (result.stdout or result.stderr).strip().splitlines()
    return lines[-1].strip() if lines else path


def _compiler() -> str:
    return _tool(os.environ.get("CXX", "c++"), "-dumpfullversion", "-dumpversion")


def _toolkit() -> str:
    home = cuda_home()
    if home is None:
        return "not found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    version = nvcc_version(home)
    return f"CUDA_HOME={home}, {'no usable nvcc' if version is None else f'nvcc {version}'}"


def _remedies() -> list[str]:
    found = []
    if EXTENSION_PROBLEM is not None and _compiler() == "not found":
        found.append("a C++20 compiler is missing: install g++ ≥ 11 or clang ≥ 14 (Debian: apt-get install g++)")
    if EXTENSION_PROBLEM is not None and shutil.which("ninja") is None:
        found.append("ninja is missing: pip install ninja")
    # Without a CUDA build of torch there is nothing that CUDA kernels could run with.
    wants_cuda = torch.version.cuda is not None and CUDA_EXTENSION_PROBLEM is not None
    if wants_cuda:
        home = cuda_home()
        problem = toolkit_problem(torch.version.cuda) or (trial_problem(home) if home is not None else None)
        found += [problem] if problem is not None else []
    if EXTENSION_PROBLEM is not None or wants_cuda:
        found.append(f"then {_REBUILD}" if found else _REBUILD)
    return found


def report() -> str:
    """Return the environment as text, one `name: value` per line, ending with what to do if something is missing."""
    rows = [
        ("vpt_kernels", vpt_kernels.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none in use"),
        ("torch's CUDA", torch.version.cuda or "none: a build for the CPU"),
        ("CUDA toolkit", _toolkit()),
        ("CPU kernels", "loaded" if EXTENSION_PROBLEM is None else EXTENSION_PROBLEM),
        ("CUDA kernels", "loaded" if CUDA_EXTENSION_PROBLEM is None else CUDA_EXTENSION_PROBLEM),
        ("C++ compiler", _compiler()),
        ("ninja", _tool("ninja", "--version")),
        *((name, _version(name)) for name in ("pillow", "numpy", "transformers", "triton", "flash-attn")),
    ]
    lines = [f"{name + ':':<16}{value}" for name, value in rows]
    lines += [f"{'to do:':<16}{remedy}" for remedy in _remedies()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    sys.exit(0)
