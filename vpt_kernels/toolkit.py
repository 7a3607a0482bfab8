"""The CUDA toolkit that a build would take, and whether it can build the CUDA kernels for a given torch.

`setup.py` runs this file before the package exists, so it imports nothing of it, and not torch either.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path


def cuda_home() -> Path | None:
    """Return the folder of the toolkit, found where torch.utils.cpp_extension looks for it, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return Path(nvcc).parent.parent
    usual = Path("/usr/local/cuda")
    return usual if usual.exists() else None


def nvcc_version(home: Path) -> str | None:
    """Return the release that the toolkit's nvcc says it is, such as "13.0"; None if it does not say one."""
    try:
        said = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    return found[1] if found and said.returncode == 0 else None


def toolkit_of(nvcc: Path) -> Path | None:
    """Return the folder whose headers an nvcc takes, wherever the command itself stands; None if it does not say."""
    command = [str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    found = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
    return Path(found[1]).resolve() if found else None


def toolkit_problem(torch_cuda: str | None) -> str | None:
    """Return why the CUDA kernels cannot be built here, with the remedy, in one line; None if nothing speaks against
    it.

    Args:
        torch_cuda: `torch.version.cuda`, the release that torch was built with; None for a build without CUDA.
    """
    if torch_cuda is None:
        return "this torch is built without CUDA: install a CUDA build of torch"
    wanted = f"the toolkit of CUDA {torch_cuda.split('.')[0]}, as torch was built with CUDA {torch_cuda}"
    home = cuda_home()
    if home is None:
        return f"there is no CUDA toolkit (CUDA_HOME, nvcc on PATH, /usr/local/cuda): install {wanted}"
    if not (home / "bin/nvcc").exists():
        return f"{home} has no bin/nvcc: install {wanted}, or set CUDA_HOME to where it is"
    version = nvcc_version(home)
    if version is None:
        return (
            f"{home}/bin/nvcc is not NVIDIA's compiler (`nvcc --version` names no release): set CUDA_HOME to {wanted}"
        )
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc of {home} is of CUDA {version}: install {wanted}, and set CUDA_HOME to it"
    if not (home / "include/cuda_runtime.h").exists():
        outside = f"{home}/bin/nvcc stands outside its toolkit ({home} has no include/cuda_runtime.h)"
        return f"{outside}: set CUDA_HOME to {toolkit_of(home / 'bin/nvcc') or wanted}"
    return None


def trial_problem(home: Path) -> str | None:
    """Return why the toolkit's nvcc cannot compile an empty kernel, which takes it a second; None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "trial.cu"), Path(folder, "trial.o")
        source.write_text("__global__ void trial() {}\n")
        try:
            command = [str(argument) for argument in (home / "bin/nvcc", "-c", source, "-o", target)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{home}/bin/nvcc cannot compile an empty kernel: {error}"
        if done.returncode == 0 and target.exists():
            return None
    said = (done.stderr or done.stdout).strip().splitlines()
    return f"{home}/bin/nvcc cannot compile an empty kernel: {said[0] if said else 'it writes nothing'}"
