"""`make gpu`, or `python -m bench.gpu [--out DIR] [--only PART ...] [--library FILE]`: every part within 9½ minutes.

Offline and with the machine's own Python. --only repeats parts by name, or a whole group of them. --library: a
`_C_cuda.so` made elsewhere for this GPU, taken if the build fails. Where VPT_GPU_REHEARSAL=1 is set, all of it runs on
the CPU, under the same limits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from bench import gpu
from bench.environment import ROOT, environment, machine
from bench.gpu.parts import parts
from bench.gpu.session import Session

SECONDS = 560
"""`timeout` ends the run at 570: until then everything that still runs is stopped, and its log is kept."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder for the results; default $VPT_GPU_RESULTS, else bench/results/<GPU>"
    )
    parser.add_argument("--only", action="append", default=[], help="a part or a group to repeat; may be given again")
    parser.add_argument("--library", type=Path, help="a prebuilt _C_cuda.so, should the build fail")
    options = parser.parse_args()
    if not gpu.REHEARSAL and not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device; `make gpu-rehearsal` runs the same without one")
        return 2
    default = os.environ.get("VPT_GPU_RESULTS") or ROOT / "bench" / "results" / machine()
    folder = Path(options.out or default).resolve()
    target = "9.0a"
    if not gpu.REHEARSAL:
        major, minor = torch.cuda.get_device_capability()
        # "a": with the features of this one alone.
        target = f"{major}.{minor}" + ("a" if major in (9, 10) else "")
    every = parts(target)
    chosen = [part for part in every if not options.only or {part.name, part.group} & set(options.only)]
    if not chosen:
        parser.error(
            f"--only {options.only}: there are the parts {[p.name for p in every]} in the groups "
            f"{list(dict.fromkeys(p.group for p in every))}"
        )

    def plan_b(name: str, ok: bool) -> None:
        if name == "build" and not ok and options.library:
            shutil.copy(options.library, ROOT / "vpt_kernels" / "_C_cuda.so")
            print(f"the build failed: {options.library} is used instead")

    session = Session(folder, SECONDS, after=plan_b)
    if not options.only:
        session.results.unlink(missing_ok=True)
        session.logs.unlink(missing_ok=True)
    os.environ[gpu.RESULTS] = str(session.results)
    gpu.record("environment", rehearsal=gpu.REHEARSAL, **environment())
    ended = session.run(chosen)
    return int(not all(ended.values()))


if __name__ == "__main__":
    sys.exit(main())
