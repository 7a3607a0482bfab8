"""The faults that `tests.mutate` plants, read from the pages beside this file.

A page lists invariants, each followed by how every backend that keeps it is broken:

    a slot at the capacity is skipped
    @@ cpp holds: test_append_formats
    - slot < capacity()
    + slot <= capacity()

`@@ BACKEND DEFINITION: TESTS`. In the backend's sources the tokens after `-` stand once inside the definitions of that
name, in whichever file and format; those after `+`, if there are any, take their place. TESTS are test modules, or the
suites of `tests/cuda/test_executed.py`, of which one must fail.

Left out is what no test here can show: in Triton a product in TF32 and missing masks at the end of a launch's last
block, which the compiled instructions and compute-sanitizer are checked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.syntax import places

HERE = Path(__file__).resolve().parent
# Where the code of a backend stands; "shared" is the Python that no backend owns, "engine" no kernel.
SOURCES = {
    "reference": ("vpt_kernels/*/reference.py",),
    "cpp": ("csrc/cpu/*", "csrc/calls/*", "csrc/math/*"),
    "cuda": ("csrc/cuda/*",),
    "triton": ("vpt_kernels/*/triton*.py",),
    "shared": ("vpt_kernels/**/*.py",),
    "engine": ("vpt_model/engine/*.py",),
}
HEADER = re.compile(r"@@ (\w+) (\w+): (.+)")


class Misplaced(LookupError):
    """What a fault names is not found once."""


@dataclass(frozen=True)
class Fault:
    name: str
    backend: str
    within: str
    tests: tuple[str, ...]
    old: str
    new: str

    @property
    def is_compiled(self) -> bool:
        return self.backend in ("cpp", "cuda")

    def place(self, root: Path) -> tuple[Path, int, int]:
        """Return the file of the tree at `root` and the range of its text that the fault replaces.

        Raises Misplaced unless there is exactly one.
        """
        found = [
            (path, *place) for path in sources(root, self.backend) for place in places(path, self.within, self.old)
        ]
        if len(found) != 1:
            names = ", ".join(sorted(path.name for path, *_ in found)) or f"the sources of {self.backend}"
            raise Misplaced(f"{self.name}: {self.old!r} stands {len(found)} times in {self.within} of {names}")
        return found[0]

    def test_files(self, root: Path) -> list[str]:
        """Return what pytest is to run; raises Misplaced for a module that is not there or there twice."""
        if self.backend == "cuda":
            return [f"tests/cuda/test_executed.py::test_suite[{suite}]" for suite in self.tests]
        files = []
        for module in self.tests:
            found = sorted(str(path.relative_to(root)) for path in (root / "tests").rglob(f"{module}.py"))
            if not found or (len(found) > 1 and "*" not in module):
                raise Misplaced(f"{self.name}: {len(found)} files are named {module}.py")
            files += found
        return files


def sources(root: Path, backend: str) -> list[Path]:
    paths = {path for pattern in SOURCES[backend] for path in root.glob(pattern)}
    if backend == "shared":
        paths -= {path for other in ("reference", "triton") for path in sources(root, other)}
    return sorted(paths)


def read(page: str) -> list[Fault]:
    """Return the faults of a page's text; raises ValueError at a line of another kind than those above."""
    faults: list[Fault] = []
    name = ""
    for line in page.splitlines():
        if header := HEADER.fullmatch(line):
            faults.append(Fault(name, header[1], header[2], tuple(header[3].split()), "", ""))
        elif line.startswith("- ") and faults and not faults[-1].old:
            faults[-1] = replace(faults[-1], old=line[2:])
        elif line.startswith("+ ") and faults and faults[-1].old and not faults[-1].new:
            faults[-1] = replace(faults[-1], new=line[2:])
        elif line.startswith(("@", "-", "+")):
            raise ValueError(f"{line!r} is neither '@@ BACKEND DEFINITION: TESTS' nor what it breaks")
        elif line:
            name = line
    return faults


FAULTS = tuple(fault for page in sorted(HERE.glob("*.diff")) for fault in read(page.read_text()))
