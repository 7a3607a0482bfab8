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
from vpt_kernels.backends import EXTENSION_PROBLEM

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps vpt-kernels, or `-e .` in a checkout"


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


def _remedies() -> list[str]:
    if EXTENSION_PROBLEM is None:
        return []
    found = []
    if _compiler() == "not found":
        found.append("a C++20 compiler is missing: install g++ ≥ 11 or clang ≥ 14 (Debian: apt-get install g++)")
    if shutil.which("ninja") is None:
        found.append("ninja is missing: pip install ninja")
    found.append(f"then rebuild: {_REBUILD}")
    return found


def report() -> str:
    """The environment as text, one `name: value` per line, ending with what to do if something is missing."""
    cuda = f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU in use"
    rows = [
        ("vpt_kernels", vpt_kernels.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("cuda", cuda),
        ("C++ extension", "loaded" if EXTENSION_PROBLEM is None else EXTENSION_PROBLEM),
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
