"""`bench/loops.cpp`, compiled for this processor: the rates that its units and its memory reach."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("loops.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
TYPES = ("float32", "bfloat16", "int8")
WAYS = {"read": (0,), "written": (1, 2), "copied": (3, 4)}
"""The loops that take bytes each way: through the caches, and around them."""
_TRIES, _STEPS, _BYTES = 5, 4_000_000, 1 << 28
"""A rate is the best of five tries of some 20 ms each: a ceiling is what nobody disturbed."""


class Loops:
    """The compiled loops; every method runs them on all threads and returns rates per second."""

    def __init__(self, library: Path) -> None:
        self._calls = ctypes.CDLL(str(library))
        integer, pointer, double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
        for name, result, *arguments in (
            ("take", pointer, integer),
            ("give_back", None, pointer),
            ("move", double, pointer, integer, ctypes.c_int, ctypes.c_int, integer),
            ("read_all", double, ctypes.POINTER(pointer), ctypes.POINTER(integer), integer, ctypes.c_int),
            ("operations", integer, ctypes.c_int),
            ("multiply", double, ctypes.c_int, ctypes.c_int, integer),
        ):
            call = getattr(self._calls, name)
            call.restype, call.argtypes = result, arguments

    @classmethod
    def compiled(cls, flags: Sequence[str] = FLAGS) -> Loops:
        """Compile the loops with $CXX, or c++. Raises ValueError where there is no compiler or it fails."""
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(compiler[0]) is None:
            raise ValueError(
                f"the ceilings are loops in C++ and {compiler[0]} is not installed: install g++, or set CXX"
            )
        with tempfile.TemporaryDirectory(prefix="vpt-bench-") as folder:
            library = Path(folder) / "loops.so"
            command = [*compiler, *flags, str(SOURCE), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip()[:500]}")
            return cls(library)

    def moved(self, sizes: Sequence[int], threads: int) -> dict[str, dict[int, float]]:
        """Return the bytes a second by way and size; a copy's count twice, once read and once written."""
        buffer = self._calls.take(max(sizes))
        if buffer is None:
            raise ValueError(f"there is no memory for {max(sizes):,} bytes; close other programs")
        try:
            return {
                way: {size: max(self._moved(buffer, size, loop, threads) for loop in loops) for size in sizes}
                for way, loops in WAYS.items()
            }
        finally:
            self._calls.give_back(buffer)

    def _moved(self, buffer: int, size: int, loop: int, threads: int) -> float:
        times = max(1, _BYTES // size)
        return max(size * times / self._calls.move(buffer, size, loop, threads, times) for _ in range(_TRIES))

    def read(self, buffers: Sequence[tuple[int, int]], threads: int) -> float:
        """Return the seconds to read every buffer, an address and its bytes, once."""
        count = len(buffers)
        addresses = (ctypes.c_void_p * count)(*(address for address, _ in buffers))
        sizes = (ctypes.c_int64 * count)(*(size for _, size in buffers))
        return self._calls.read_all(addresses, sizes, count, threads)

    def multiplied(self, threads: int) -> dict[str, float]:
        """Return the operations a second by type, of those for which the processor has a unit."""
        found = {}
        for number, name in enumerate(TYPES):
            if operations := self._calls.operations(number):
                fastest = min(self._calls.multiply(number, threads, _STEPS) for _ in range(_TRIES))
                found[name] = operations * threads * _STEPS / fastest
        return found
