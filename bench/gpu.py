"""What a machine with an NVIDIA GPU can prove: `make gpu`, or `python bench/gpu.py [--out DIR]`.

Offline and with the machine's own Python: builds the extension for this GPU, runs the tests marked `gpu`, measures the
operators and the engine, runs tiny calls of every backend under compute-sanitizer, and the C++ backend's tests on this
torch. Each part writes its result before the next begins; a part that fails or runs out of time does not stop the
others. All of it ends within nine minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, from anywhere
    sys.path.insert(0, str(ROOT))

from bench.environment import environment, machine  # noqa: E402

SECONDS = 530
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
Part = dict[str, Any]


class Session:
    """Runs commands until the time is used up; every command's whole output goes to a log in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.end = folder, time.monotonic() + SECONDS

    def run(self, name: str, *command: str, limit: float, **extra: str) -> Part:
        seconds = min(limit, self.end - time.monotonic())
        if seconds < 10:
            return {"ok": False, "summary": "not run: the nine minutes are over"}
        begin = time.monotonic()
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            try:
                options = {"cwd": ROOT, "env": {**os.environ, **extra}, "stdout": output, "stderr": subprocess.STDOUT}
                code: int | None = subprocess.run(command, timeout=seconds, check=False, **options).returncode
            except subprocess.TimeoutExpired:
                code = None
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        summary = f"stopped after {seconds:.0f} s" if code is None else lines[-1].strip("= ") if lines else ""
        return {"ok": code == 0, "summary": summary, "seconds": round(time.monotonic() - begin, 1)}


def build(session: Session) -> Part:
    major, minor = torch.cuda.get_device_capability()
    # Only this GPU: the machine code of all four targets takes minutes more. "a": with the features of this one alone.
    target = f"{major}.{minor}" + ("a" if major in (9, 10) else "")
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    part = session.run("build", *command, limit=240, TORCH_CUDA_ARCH_LIST=target, MAX_JOBS=str(os.cpu_count() or 4))
    probe = (
        "from vpt_kernels.backends import CAPABILITIES, EXTENSION_PROBLEM, reasons; import torch; "
        "d = torch.device('cuda'); "
        "print(EXTENSION_PROBLEM or '; '.join(f'{o}: ' + ', '.join(b for b, why in reasons(o, d, torch.uint8 if o == "
        "'roi_patches' else torch.float32).items() if why is None) for o in CAPABILITIES))"
    )
    found = session.run("probe", sys.executable, "-c", probe, limit=60)
    return part | {"usable on CUDA tensors": found["summary"], "ok": part["ok"] and found["ok"]}


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", *arguments)


def tests(session: Session) -> Part:
    return session.run("tests", *_pytest("tests/gpu"), limit=200)


def benchmark(session: Session) -> Part:
    command = (sys.executable, "-m", "bench", "run", "--processes", "1", "--out", str(session.folder))
    return session.run("benchmark", *command, "--only", "not engine", limit=200)


def engine(session: Session) -> Part:
    """Decoding and second looks of the 2B in float32, beside transformers and the published procedure."""
    command = (sys.executable, "-m", "bench", "run", "--processes", "1", "--out", str(session.folder / "engine"))
    return session.run("engine", *command, "--only", "test_engine", limit=150)


def sanitizer(session: Session) -> Part:
    """Tiny calls of every backend; PyTorch's caching allocator would hide an overrun into a neighbour's block."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": True, "summary": "compute-sanitizer is not installed"}
    parts = {}
    for name in SANITIZERS:
        # initcheck also reports PyTorch's own kernels, which copy padding: only ours are watched.
        options = ("--kernel-name", "regex:.*(vpt|_kernel).*") if name == "initcheck" else ()
        command = (tool, "--tool", name, "--error-exitcode", "9", *options, sys.executable, "-m", "tests.gpu.smoke")
        parts[name] = session.run(name, *command, limit=60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"ok": all(part["ok"] for part in parts.values()), "summary": "", **parts}


def cpu_tests(session: Session) -> Part:
    parallel = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    return session.run("cpu_tests", *_pytest(*parallel, "tests/kernels", "-k", "not reference"), limit=150)


PARTS: tuple[Callable[[Session], Part], ...] = (build, tests, benchmark, engine, sanitizer, cpu_tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("VPT_GPU_RESULTS")
    parser.add_argument("--out", type=Path, default=default and Path(default), help="folder for the results; default "
                        "$VPT_GPU_RESULTS, else bench/results/<GPU>")  # fmt: skip
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device; run it where `python3 -c 'import torch; torch.cuda.init()'` works")
        return 2
    folder = (arguments.out or ROOT / "bench" / "results" / machine()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    session, results = Session(folder), {"environment": environment()}
    for part in PARTS:
        try:
            results[part.__name__] = part(session)
        except Exception as error:  # noqa: BLE001  (one failing part must not stop the others)
            results[part.__name__] = {"ok": False, "summary": f"{type(error).__name__}: {error}"}
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    failed = False
    for part in PARTS:
        result = results[part.__name__]
        failed |= not result["ok"]
        print(f"{part.__name__:<10} {'ok' if result['ok'] else 'FAILED':<7} {result['summary']}")
        for name, inner in result.items():
            if isinstance(inner, dict):
                print(f"  {name:<10} {'ok' if inner['ok'] else 'FAILED':<7} {inner['summary']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
