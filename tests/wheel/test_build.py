"""setup.py where the CUDA toolkit is unusable in some way: the CPU library is built, and the reason is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.cuda import nvcc
from vpt_kernels import toolkit

ROOT = Path(__file__).resolve().parents[2]
# For a torch that was built with the first argument's CUDA or, where it is empty, without, whatever this one is.
SETUP = """
import runpy, sys, torch
torch.version.cuda, torch.cuda._is_compiled = sys.argv[1] or None, lambda: bool(torch.version.cuda)
torch.cuda.is_available = lambda: False
sys.argv = ["setup.py", *sys.argv[2:]]
runpy.run_path("setup.py", run_name="__main__")
"""
SAYS_13 = "echo 'Cuda compilation tools, release 13.0, V13.0.88'"
NVCC = {
    # name: bin/nvcc as a shell script, or None; whether headers stand beside it; what is said of it
    "no nvcc": (None, True, "has no bin/nvcc"),
    "says nothing": ("exit 0", True, "is not NVIDIA's compiler"),
    "other major": ("echo 'Cuda compilation tools, release 12.4, V12.4.131'", True, "is of CUDA 12.4"),
    "writes nothing": (SAYS_13, True, "kernel.o"),
    "compiles nothing": (f'{SAYS_13}; [ "$1" = --version ] || exit 1', True, "Error compiling objects"),
    "wrapper": (f'{SAYS_13}; echo "#\\$ TOP=/opt/cuda-13/bin/.." >&2', False, "set CUDA_HOME to /opt/cuda-13 ("),
}


def make_toolkit(folder: Path, script: str | None, headers: bool) -> Path:
    (folder / "bin").mkdir(parents=True)
    if script is not None:
        (folder / "bin/nvcc").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin/nvcc").chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime.h").write_text("")
    return folder


def make_project(folder: Path) -> Path:
    """A project of the same shape, with one function in each library."""
    for name in ("csrc/cuda", "vpt_kernels"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "vpt_kernels/toolkit.py", folder / "vpt_kernels")
    (folder / "vpt_kernels/__init__.py").write_text("")
    (folder / "csrc/register.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int one() { return 1; }'
    )
    (folder / "csrc/cuda/register.cpp").write_text("#include <cuda_runtime.h>\nint two() { return 2; }\n")
    (folder / "csrc/cuda/kernel.cu").write_text("__global__ void kernel() {}\n")
    return folder


def build(
    folder: Path, home: Path, *command: str, torch_cuda: str | None = "13.0", **extra: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": "9.0a", **extra}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", SETUP, torch_cuda or "", "-q", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("name", NVCC)
def test_an_unusable_toolkit_costs_the_cuda_library_alone(tmp_path, name):
    script, headers, reason = NVCC[name]
    home = make_toolkit(tmp_path / "toolkit", script, headers)
    project = make_project(tmp_path / "project")
    done = build(project, home, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert libraries(project) == ["_C.so"], done.stdout + done.stderr
    (line,) = [
        line for line in done.stderr.splitlines() if line.startswith("vpt-kernels: vpt_kernels._C_cuda is left out")
    ]
    assert reason in line or (toolkit_accepts(home) and reason in done.stdout + done.stderr), line


def libraries(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "vpt_kernels").glob("*.so"))


@pytest.mark.parametrize("torch_cuda", ("13.0", None))
@pytest.mark.parametrize("command", (("build_ext", "--inplace"), ("bdist_wheel",)))
def test_a_library_of_an_earlier_build_does_not_outlive_a_failed_one(tmp_path, torch_cuda, command):
    """Not for want of a toolkit, and not beside a torch that has no CUDA; a wheel leaves the tree's own alone."""
    home = make_toolkit(tmp_path / "toolkit", *NVCC["no nvcc"][:2])
    project = make_project(tmp_path / "project")
    in_tree = project / "vpt_kernels"
    in_build = project / f"build/lib.{sysconfig.get_platform()}-cpython-{sys.version_info[0]}{sys.version_info[1]}"
    for folder in (in_tree, in_build / "vpt_kernels"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("_C.so", "_C_cuda.so"):
            (folder / name).write_text("of an earlier build")
    (project / "csrc/register.cpp").write_text("this does not compile")
    done = build(project, home, *command, torch_cuda=torch_cuda)
    assert done.returncode == 0 and "vpt_kernels._C is left out" in done.stderr, done.stdout + done.stderr
    assert libraries(in_build) == []
    assert libraries(project) == ([] if "--inplace" in command else ["_C.so", "_C_cuda.so"])


def toolkit_accepts(home: Path) -> bool:
    """What only a compilation shows cannot be said before one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(home))
        return toolkit.toolkit_problem("13.0") is None


@pytest.mark.parametrize("name", NVCC)
def test_the_reason_is_found_again(tmp_path, name, monkeypatch):
    """After the installation, whose output pip hides: the same words, or the trial's."""
    script, headers, reason = NVCC[name]
    home = make_toolkit(tmp_path / "toolkit", script, headers)
    monkeypatch.setenv("CUDA_HOME", str(home))
    problem = toolkit.toolkit_problem("13.0")
    if problem is None:
        assert name in ("writes nothing", "compiles nothing")
        assert "cannot compile an empty kernel" in toolkit.trial_problem(home)
    else:
        assert str(home) in problem and reason.removesuffix(" (") in problem and "\n" not in problem


def test_a_usable_toolkit_builds_both(tmp_path, monkeypatch):
    home = toolkit.toolkit_of(Path(nvcc.nvcc()))
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert toolkit.toolkit_problem(f"{toolkit.nvcc_version(home).split('.')[0]}.9") is None
    assert toolkit.trial_problem(home) is None
    nvcc.stub(tmp_path)
    for name in ("libc10_cuda.so", "libcudart.so"):
        shutil.copy(tmp_path / "libtorch_cuda.so", tmp_path / name)
    project = make_project(tmp_path / "project")
    done = build(project, home, "bdist_wheel", LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert libraries(next((project / "build").glob("lib*"))) == ["_C.so", "_C_cuda.so"], done.stdout + done.stderr
    assert "left out" not in done.stderr


REPORT = """
import logging, torch
logging.basicConfig(format="LOG %(name)s %(message)s")
torch.version.cuda = "13.0"
from vpt_kernels import backends, env
print("CPU", backends.EXTENSION_PROBLEM)
print(env.report())
"""


@pytest.mark.parametrize("name", ("other major", "writes nothing"))
def test_what_is_said_where_the_cuda_library_is_missing(tmp_path, name):
    """The CPU kernels load; one line at import, and the report, name the toolkit, what is wrong and what to do."""
    script, headers, reason = NVCC[name]
    home = make_toolkit(tmp_path / "toolkit", script, headers)
    leave = shutil.ignore_patterns("_C_cuda.so", "__pycache__")
    shutil.copytree(ROOT / "vpt_kernels", tmp_path / "vpt_kernels", ignore=leave)
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.startswith("CPU None\n"), done.stdout + done.stderr
    (notice,) = [line for line in done.stderr.splitlines() if line.startswith("LOG vpt_kernels")]
    rows = dict(line.split(":", 1) for line in done.stdout.splitlines()[1:] if not line.startswith("to do"))
    rows = {key: value.strip() for key, value in rows.items()}
    remedies = [line for line in done.stdout.splitlines() if line.startswith("to do:")]
    assert rows["torch's CUDA"] == "13.0" and rows["CPU kernels"] == "loaded"
    assert rows["CUDA toolkit"].startswith(f"CUDA_HOME={home}, nvcc 1") and "was not built" in rows["CUDA kernels"]
    assert "backend 'cuda'" in notice and "python -m vpt_kernels.env" in notice
    said = reason if name == "other major" else "cannot compile an empty kernel"
    assert said in remedies[0] and "rebuild" in remedies[1]
    assert reason in notice or name == "writes nothing"


def test_without_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "cuda_home", lambda: None)
    assert "there is no CUDA toolkit" in toolkit.toolkit_problem("13.0")
    assert "without CUDA" in toolkit.toolkit_problem(None)


def test_home_is_found_where_torch_finds_it(tmp_path, monkeypatch):
    """The build is torch's, so the words about it must be about the same folder."""
    from torch.utils.cpp_extension import _find_cuda_home

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it warns otherwise
    homes = {name: make_toolkit(tmp_path / name, "exit 0", True) for name in ("A", "B", "C")}
    for names in ({"CUDA_HOME": "A", "CUDA_PATH": "B"}, {"CUDA_PATH": "B"}, {"CUDA_HOME": "", "CUDA_PATH": "B"}, {}):
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, folder in names.items():
            monkeypatch.setenv(name, str(homes[folder]) if folder else "")
        for path in (str(homes["C"] / "bin"), str(tmp_path)):
            monkeypatch.setenv("PATH", path)
            expected = _find_cuda_home()
            assert toolkit.cuda_home() == (Path(expected) if expected else None), (names, path)
