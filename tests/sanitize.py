"""The C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, with GCC on Linux.

    python -m tests.sanitize [--quick]

Three parts: the native programs (every instruction set that this processor has; the others are named), the operators'
parallel loops on plain threads, and the operators' own tests on an instrumented build of the extension. The sanitizers
first find a planted fault each. `--quick` takes the tests of bad input and of layouts alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import SEED
from tests.mutate import Tree
from tests.native.programs import COMPILER, compile_program, run_program

MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
THREADS = ["-fsanitize=thread", "-g", "-fPIE", "-pie"]
QUICK = ("test_append_bad_input", "test_append_layouts", "test_control_bad_input", "test_roi_bad_input")
PLANTED = {
    "heap-buffer-overflow": "int* p = new int[4]; int x = p[4 + (n > 9)]; delete[] p; return x;",
    "signed integer overflow": "return n + 2147483647;",
}


def demand(holds: bool, problem: str) -> None:
    if not holds:
        raise SystemExit(f"sanitize: {problem}")


def native(folder: Path) -> None:
    for name in ("nearest_check", "simd_check"):
        done = run_program(compile_program(name, folder, *MEMORY), SEED)
        demand(done.returncode == 0, f"{name}, seed {SEED}: {done.stdout}{done.stderr}")
        print(f"{name}: {'; '.join(done.stdout.splitlines())}", flush=True)


def threads(folder: Path) -> None:
    # libtorch's own loops, which are not instrumented, stay in the thread that calls them.
    environment = {"OMP_NUM_THREADS": "1", "TSAN_OPTIONS": "halt_on_error=1"}
    program = compile_program("threads_check", folder, *THREADS)
    planted = run_program(program, SEED, "plant", **environment)
    demand(planted.returncode != 0 and "data race" in planted.stderr, f"no race was found: {planted.stderr}")
    done = run_program(program, SEED, **environment)
    demand(done.returncode == 0, f"threads_check, seed {SEED}: {done.stdout}{done.stderr}")
    print(f"threads_check: {'; '.join(done.stdout.splitlines())}", flush=True)


def runtime(name: str) -> str:
    """The path of a library of the compiler."""
    return subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def instrumented(folder: Path) -> Tree:
    """A copy of the repository with an instrumented extension, in an environment in which Python can load it."""
    tree, flags = Tree(folder), " ".join(MEMORY)
    tree.environment |= {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": flags}
    problem = tree.build()
    demand(problem is None, f"the extension does not build: {problem}")
    # The C++ runtime too: AddressSanitizer looks for what throws exceptions when it starts.
    preloaded = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
    options = "detect_leaks=0:allocator_may_return_null=1"
    tree.environment |= {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
    for expected, body in PLANTED.items():
        source, library = folder / "planted.cpp", folder / "planted.so"
        source.write_text(f'extern "C" int planted(int n) {{ {body} }}\n')
        subprocess.run([COMPILER, *MEMORY, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        done = tree.run("-c", f"import torch, ctypes; ctypes.CDLL({str(library)!r}).planted(5)", timeout=120)
        demand(done.returncode != 0 and expected in done.stdout, f"no {expected} was found: {done.stdout}")
    used = subprocess.run(
        ["nm", "-D", tree.root / "vpt_kernels/_C.so"], capture_output=True, text=True, check=True
    ).stdout
    demand("__asan_report_load" in used and "__ubsan_handle" in used, "the extension is not instrumented")
    return tree


def operators(folder: Path, quick: bool) -> None:
    tree = instrumented(folder)
    files = [f"tests/kernels/{name}.py" for name in QUICK] if quick else ["tests/kernels"]
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", "not reference"]
    done = tree.run("-m", "pytest", *options, *files, timeout=3000)
    demand(done.returncode == 0, done.stdout)
    print(f"operators: {done.stdout.splitlines()[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tests of bad input and of layouts alone")
    arguments = parser.parse_args()
    demand(sys.platform == "linux" and os.path.isabs(runtime("libasan.so")), "needs GCC and its libasan on Linux")
    with tempfile.TemporaryDirectory() as folder:
        native(Path(folder))
        threads(Path(folder))
        operators(Path(folder), arguments.quick)


if __name__ == "__main__":
    main()
