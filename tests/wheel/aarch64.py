"""`python -m tests.wheel.aarch64 FOLDER`: the wheel for aarch64, cross-built into FOLDER, and the native programs.

The programs run under user-mode emulation (Debian: `apt-get install g++-aarch64-linux-gnu qemu-user`). The library is
linked against empty stand-ins for torch's libraries of that architecture and is loaded by nobody here: what it asks of
torch are the functions that the library of this machine asks of it, which is checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import SEED
from tests.native.programs import ROOT, compile_program, run_program

PREFIX = "aarch64-linux-gnu-"
TORCH_LIBRARIES = ("c10", "torch", "torch_cpu")


def demand(holds: bool, problem: str) -> None:
    if not holds:
        raise SystemExit(f"aarch64: {problem}")


def said(*command: object, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    demand(done.returncode == 0, f"{command[0]} failed: {done.stdout}{done.stderr}")
    return done.stdout


def programs(folder: Path) -> None:
    for name in ("nearest_check", "simd_check"):
        program = compile_program(name, folder, "-static", compiler=f"{PREFIX}g++")
        done = run_program(program, SEED, emulator=("qemu-aarch64",))
        demand(done.returncode == 0, f"{name}, seed {SEED}: {done.stdout}{done.stderr}")
        print(f"{name} on aarch64, emulated: {'; '.join(done.stdout.splitlines())}", flush=True)


def wheel(folder: Path, out: Path) -> None:
    for name in TORCH_LIBRARIES:
        flags = ["-shared", "-x", "c", os.devnull, f"-Wl,-soname=lib{name}.so"]
        said(f"{PREFIX}gcc", *flags, "-o", folder / f"lib{name}.so")
    linker = f"{PREFIX}g++ -shared"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CC": f"{PREFIX}gcc",
        "CXX": f"{PREFIX}g++",
        "LDSHARED": linker,
        "LDCXXSHARED": linker,
        # The stand-ins have no symbols: the linker would drop them. Stripped, as `make dist` strips.
        "LDFLAGS": f"-L{folder} -Wl,--no-as-needed -s",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }
    command = [
        "setup.py",
        "-q",
        "build",
        "--build-base",
        folder / "build",
        "bdist_wheel",
        "--dist-dir",
        folder / "wheel",
    ]
    said(sys.executable, *command, cwd=ROOT, env=environment)
    (built,) = (folder / "build").rglob("_C.so")
    demand("AArch64" in said(f"{PREFIX}readelf", "-h", built), f"{built} is of another architecture")
    dynamic = said(f"{PREFIX}readelf", "-d", built)
    demand(all(f"[lib{name}.so]" in dynamic for name in TORCH_LIBRARIES), f"torch's libraries are not named: {dynamic}")
    more = asked(built) - asked(ROOT / "vpt_kernels/_C.so")
    demand(not more, f"functions of torch that the library of this machine does not ask for: {sorted(more)}")
    options = [f"--exclude=lib{name}.so" for name in TORCH_LIBRARIES]
    out.mkdir(parents=True, exist_ok=True)
    said(sys.executable, "-m", "auditwheel", "repair", *options, "-w", out, *(folder / "wheel").glob("*.whl"))
    (repaired,) = out.glob("*aarch64.whl")
    demand("-cp310-abi3-manylinux_" in repaired.name, f"{repaired.name} has another tag than cp310-abi3-manylinux_…")
    print(f"{repaired} is built; it was loaded by nobody here", flush=True)


def asked(library: Path) -> set[str]:
    """The functions of torch that a library needs."""
    listed = said(f"{PREFIX}nm", "-D", "--undefined-only", "--format=posix", library).splitlines()
    return {name for name in (line.split()[0] for line in listed) if name.startswith(("aoti_", "torch_"))}


def main() -> None:
    for tool in (f"{PREFIX}g++", "qemu-aarch64"):
        demand(shutil.which(tool) is not None, f"{tool} is missing: apt-get install g++-aarch64-linux-gnu qemu-user")
    with tempfile.TemporaryDirectory() as folder:
        programs(Path(folder))
        wheel(Path(folder), Path(sys.argv[1]).resolve())


if __name__ == "__main__":
    main()
