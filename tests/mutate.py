"""Applies one-line faults to a copy of the kernels, one at a time, and demands that the tests notice each.

    python -m tests.mutate [--only NAME] [--backend reference|cpp|cuda|triton|shared|engine]

What is broken, and where, stands in `tests/faults`. Every result goes into `tests/mutations.md` at once; what is not
tried keeps its line. The exit status is 1 if a fault survives, does not build, or breaks the collection of the tests:
only a test that fails has caught it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.planted import FAULTS, SOURCES, Fault, Misplaced

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/mutations.md"
LINE = re.compile(r"^(\|.+\| .+ \| .+ \| )(.*) \|$", re.MULTILINE)
LEFT_OUT = (".*", "*venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
FILTERS = {name: [] for name in SOURCES} | {"reference": ["-k", "not cpp"], "cpp": ["-k", "not reference"]}
BUILD_SECONDS, TEST_SECONDS = 900, 900
# pytest's exit status when tests failed; a crash, a usage error or a collection error has another.
TESTS_FAILED = 1


class Tree:
    """A private copy of the repository, with its own build of the extension."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        # Without .pyc files: an edit within the clock's resolution would not invalidate one.
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": tools, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.root)}
        self.environment.pop("VPT_KERNELS_CHECK", None)

    def run(self, *arguments: str, timeout: int, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=self.root, env=self.environment | extra, timeout=timeout, **merged)

    def build(self) -> str | None:
        """Compile what changed; return the compiler's words if there is no library afterwards."""
        for library in (self.root / "vpt_kernels").glob("_C*.so"):
            library.unlink()
        result = self.run("setup.py", "-q", "build_ext", "--inplace", timeout=BUILD_SECONDS)
        built = result.returncode == 0 and any((self.root / "vpt_kernels").glob("_C*.so"))
        return None if built else result.stdout

    def build_cuda(self) -> str | None:
        """Compile the CUDA sources for the CPU, which executes them in their tests."""
        result = self.run("-c", "from tests.cuda.on_cpu import build; build()", timeout=BUILD_SECONDS)
        return result.stdout if result.returncode else None

    def test(self, files: Iterable[str], backend: str) -> subprocess.CompletedProcess[str]:
        options = ["-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        extra = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
        return self.run("-m", "pytest", *options, *FILTERS[backend], *files, timeout=TEST_SECONDS, **extra)

    @contextmanager
    def broken(self, fault: Fault) -> Iterator[None]:
        """The fault's file has the new text inside, and the old again afterwards."""
        path, begin, end = fault.place(self.root)
        sound = path.read_text()
        path.write_text(sound[:begin] + fault.new + sound[end:])
        try:
            yield
        finally:
            path.write_text(sound)


def misplaced(tree: Tree, faults: Iterable[Fault]) -> list[str]:
    """What is said of the faults whose place or whose tests are not found."""
    problems = []
    for fault in faults:
        try:
            fault.place(tree.root)
            fault.test_files(tree.root)
        except Misplaced as problem:
            problems.append(str(problem))
    return problems


def sound(tree: Tree, faults: Iterable[Fault]) -> str | None:
    """None if the tree without a fault imports its own library and passes the tests, else what went wrong."""
    where = "import vpt_kernels.backends as b; print(b.__file__, b.EXTENSION_PROBLEM)"
    result = tree.run("-c", where, timeout=TEST_SECONDS)
    if result.stdout.strip() != f"{tree.root / 'vpt_kernels/backends.py'} None":
        return result.stdout
    for backend in ("reference", "cpp", "cuda", "triton", "engine"):
        mine = (backend, "shared") if backend in ("reference", "cpp") else (backend,)
        files = dict.fromkeys(test for fault in faults if fault.backend in mine for test in fault.test_files(tree.root))
        result = tree.test(files, backend) if files else result
        if result.returncode:
            return result.stdout
    return None


def caught_by(tree: Tree, fault: Fault) -> tuple[bool, str]:
    """Whether a test failed, and which; or what happened instead."""
    try:
        with tree.broken(fault):
            build = tree.build_cuda if fault.backend == "cuda" else tree.build
            if fault.is_compiled and (problem := build()):
                return False, f"does not build: {problem[-1500:]}"
            result = tree.test(fault.test_files(tree.root), fault.backend)
    except subprocess.TimeoutExpired as error:
        return False, f"did not end in {error.timeout} s"
    if result.returncode == 0:
        return False, "SURVIVED"
    failed = re.search(r"^FAILED tests/(\S+?)(?:\[|\s|$)", result.stdout, re.MULTILINE)
    if result.returncode != TESTS_FAILED or failed is None or re.search(r"^ERROR ", result.stdout, re.MULTILINE):
        return False, f"pytest ended with {result.returncode}: {result.stdout[-1500:]}"
    return True, failed[1].split("/", 1)[1]


def record(fault: Fault, note: str) -> None:
    """Write one line of the table; lines of faults that no longer exist go."""
    known = dict(LINE.findall(TABLE.read_text())) if TABLE.exists() else {}
    known[_place(fault)] = note
    lines = [f"{_place(fault)}{known.get(_place(fault), 'not tried')} |" for fault in FAULTS]
    head = "# Faults and the tests that catch them\n\n| fault | backend | in | caught by |\n|---|---|---|---|"
    TABLE.write_text("\n".join([head, *lines]) + "\n")


def _place(fault: Fault) -> str:
    return f"| {fault.name} | {fault.backend} | {fault.within} | "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="faults of this name")
    parser.add_argument("--backend", choices=tuple(FILTERS), help="faults in this backend's code")
    options = parser.parse_args()
    faults = [f for f in FAULTS if options.only in (None, f.name) and options.backend in (None, f.backend)]
    if not faults:
        parser.error(f"no fault matches; the names are {sorted({fault.name for fault in FAULTS})}")
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="vpt-mutate-") as folder:
        tree = Tree(Path(folder))
        if problems := misplaced(tree, faults):
            print(*problems, sep="\n")
            return 1
        if problem := tree.build() or sound(tree, faults):
            print(problem, "The tree fails without a fault; nothing was tried.", sep="\n")
            return 1
        # C++ last: the library keeps a fault until the next build. By file: what one fault touched is built once more.
        for number, fault in enumerate(sorted(faults, key=lambda f: (f.is_compiled, f.place(ROOT))), 1):
            caught, note = caught_by(tree, fault)
            survivors += not caught
            print(f"[{number}/{len(faults)}] {fault.name} | {fault.backend} | {note}", flush=True)
            record(fault, note.splitlines()[0])
    print(f"{len(faults) - survivors} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
