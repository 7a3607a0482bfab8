"""The instruction sets that an operator's C++ kernels may be made to use, and those that this processor has."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vpt_kernels

NAMES = ("avx512", "avx2", "generic")


class Kernels:
    """Those of one operator. chooser: the library's function that chooses among them, nullptr being the widest."""

    def __init__(self, chooser: str) -> None:
        self._choose = getattr(ctypes.CDLL(str(Path(vpt_kernels.__file__).with_name("_C.so"))), chooser)
        self._choose.argtypes, self._choose.restype = [ctypes.c_char_p], ctypes.c_char_p
        self.names = tuple(name for name in NAMES if self._choose(name.encode()))
        self.widest = self._choose(None).decode()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The C++ backend computes with the kernels of this instruction set."""
        assert self._choose(name.encode()).decode() == name
        try:
            yield
        finally:
            assert self._choose(None).decode() == self.widest


def expected() -> tuple[str, ...]:
    """What /proc/cpuinfo says that this processor has, the widest first."""
    flags = set()
    if platform.machine() == "x86_64" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            flags = set(next(line for line in file if line.startswith("flags")).split())
    if not {"avx2", "fma", "f16c"} <= flags:
        return NAMES[2:]
    return NAMES if {"avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= flags else NAMES[1:]
