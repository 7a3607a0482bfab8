"""What ten minutes of a GPU are spent on, in this order, because the headline must survive a run that dies early."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

from bench.gpu import REHEARSAL
from bench.gpu.session import ROOT, Part

OPERATORS = ("roi_patch_embed", "control_cross_attention", "append_visual_kv", "attention")
INTERPRETED = {"TRITON_INTERPRET": "1"} if REHEARSAL else {}
BUILD = ROOT / "build" / "gpu-rehearsal-build"
"""Where a rehearsal builds: not beside the sources, whose library is in use."""


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def build(target: str) -> Part:
    """Return the extension for this GPU alone: the machine code of all four targets takes minutes more."""
    command = (sys.executable, "setup.py", "-q", "build_ext")
    command += ("--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")) if REHEARSAL else ("--inplace",)
    environment = {"TORCH_CUDA_ARCH_LIST": target, "MAX_JOBS": str(os.cpu_count() or 4)}
    return Part("build", "smoke, Triton", command, 240, background=True, environment=environment)


def smoke(backend: str) -> list[Part]:
    """Return tiny calls, one process an operator: a crash of one is not that of the others."""
    name = "Triton" if backend == "triton" else "CUDA"
    operators = OPERATORS if backend == "triton" else OPERATORS[:-1]
    needs = "build" if backend == "cuda" and not REHEARSAL else ""
    kind = "cpp" if REHEARSAL and backend == "cuda" else backend
    return [
        Part(
            f"smoke {backend} {operator}",
            f"smoke, {name}",
            _module("tests.gpu.smoke", "--backend", kind, "--operator", operator),
            45,
            needs=needs,
            beside=number > 0,
            environment=INTERPRETED if backend == "triton" else {},
        )
        for number, operator in enumerate(operators)
    ]


def sanitizers() -> list[Part]:
    """Return memory and race checks of the smoke's compiled kernels. PyTorch's allocator would hide an overrun."""
    found = shutil.which("compute-sanitizer")
    tool = _module("bench.gpu.recording_sanitizer") if REHEARSAL else (found or "compute-sanitizer",)
    backend = "cpp" if REHEARSAL else "all"
    return [
        Part(
            f"sanitizer {name}",
            "sanitizers",
            (*tool, "--tool", name, "--error-exitcode", "9", *_module("tests.gpu.smoke", "--backend", backend)),
            60,
            beside=number > 0,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for number, name in enumerate(("memcheck", "racecheck"))
    ]


def tests() -> Part:
    options = ("-q", "-p", "no:cacheprovider", "-rf")
    if find_spec("xdist"):
        options += ("-n", "2" if REHEARSAL else "8")
    if REHEARSAL:  # the tests of a GPU cannot run here: that they can be collected can be known
        return Part("tests", "tests", _module("pytest", *options[:3], "--collect-only", "tests/gpu"), 110)
    return Part("tests", "tests", _module("pytest", *options, "tests/gpu"), 110)


def tune() -> list[Part]:
    questions = [("resample_kernel", "all"), ("embed_kernel", "few rows"), ("split_kernel", "DECODE")]
    if REHEARSAL:  # what the interpreter can time in its seconds
        questions = [("append_kernel", "few tokens")]
    device = "cpu" if REHEARSAL else "cuda"
    return [
        Part(
            f"tune {kernel}",
            "tune",
            _module(
                "bench.tune",
                "--kernel",
                kernel,
                "--size",
                size,
                "--device",
                device,
                "--seconds",
                "12",
                "--rounds",
                "6" if REHEARSAL else "15",
                "--record",
            ),
            20,
            environment=INTERPRETED,
        )
        for kernel, size in questions
    ]


def parts(target: str) -> list[Part]:
    """Return all, in their order; `group` names the parts that answer one question, as `--only` takes it."""
    engine, rivals = "bench.gpu.engine", "bench.gpu.rivals"
    return [
        build(target),
        *smoke("triton"),
        *smoke("cuda"),
        Part("decode 2b", "engine", _module(engine, "decode", "2b"), 75),
        Part("looks 2b", "engine", _module(engine, "looks", "2b"), 75),
        Part("profile 2b", "profile", _module(engine, "profile", "2b"), 30),
        Part("decode 7b", "7B and rivals", _module(engine, "decode", "7b"), 60),
        Part("transformers 2b", "7B and rivals", _module(rivals, "transformers", "2b"), 60),
        Part("ours, compiled 2b", "7B and rivals", _module(rivals, "ours", "2b"), 60),
        Part("operators", "operators", _module("bench.gpu.operators"), 70),
        tests(),
        *sanitizers(),
        *tune(),
    ]
