"""Where a number comes from: machine, versions, settings and commit."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transformers", "triton", "pillow", "numpy", "flash-attn", "flashinfer-python", "liger-kernel")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def commit() -> str:
    """Return the commit of the tree and, where it was changed, a sign of the changes."""
    changes = _output("git", "status", "--short") + _output("git", "diff", "HEAD")
    sign = f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else ""
    return _output("git", "rev-parse", "--short", "HEAD") + sign


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> str:
    """Return a folder name for results: the GPU's name, else the processor's with the number of threads."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, object]:
    """Return what a reader needs to judge or to repeat a run."""
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
    }
    if torch.cuda.is_available():
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        settings = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, query: settings}
    return found
