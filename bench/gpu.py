"""What a machine with an NVIDIA GPU can prove today: `make gpu`, or `python bench/gpu.py [--out DIR]`.

Offline and with the machine's own Python: builds and loads the extension, runs the tests that need no optional
package and those marked `gpu`, and records the copy bandwidth and matrix-product rates that later numbers are held
against. Each part writes its result before the next begins; a part that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192


def _milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call between device events, after a warm-up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def build() -> dict:
    started = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    probe = "import vpt_kernels.backends as b; print(b.EXTENSION_PROBLEM or 'loaded')"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    state = loaded.stdout.strip() or loaded.stderr[-2000:]
    return {
        "ok": state == "loaded",
        "extension": state,
        "seconds": round(time.perf_counter() - started, 1),
        "log": (result.stdout + result.stderr)[-4000:],
    }


def tests() -> dict:
    folders = ["tests/gpu", "tests/kernels"]
    command = [sys.executable, "-m", "pytest", *folders, "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=420)
    lines = result.stdout.strip().splitlines()
    return {"ok": result.returncode == 0, "summary": lines[-1] if lines else "", "log": result.stdout[-8000:]}


def ceilings() -> dict:
    """Device-to-device copy (bytes read + written) and matrix products on random data."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = _milliseconds(lambda: target.copy_(source))
    rates = {"copy_TB_per_s": 2 * COPY_BYTES / copy / 1e9}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        elapsed = _milliseconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        rates[f"matmul_{name}_TFLOP_per_s"] = 2 * MATMUL_SIZE**3 / elapsed / 1e9
    return {"ok": True, **{name: round(rate, 2) for name, rate in rates.items()}}


def environment() -> dict:
    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results/<GPU name>")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device; run it where `python3 -c 'import torch; torch.cuda.init()'` works")
        return 2
    results: dict[str, dict] = {"environment": environment()}
    folder = arguments.out or ROOT / "bench" / "results" / results["environment"]["device"].replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for part in (build, tests, ceilings):
        try:
            results[part.__name__] = part()
        except Exception as error:  # noqa: BLE001  (one failing part must not stop the others)
            results[part.__name__] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, result in results.items():
        shown = {key: value for key, value in result.items() if key != "log"}
        print(f"{name:<12} " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    return 0 if all(result.get("ok", True) for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
