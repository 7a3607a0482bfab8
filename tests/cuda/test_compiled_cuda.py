"""Every CUDA kernel compiled for every target, within budgets; and the library, which loads where there is no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import setup
from tests.cuda import nvcc
from tests.cuda.on_cpu import ROOT, SOURCES, TORCH

# Whichever of them comes first waits for nvcc to compile everything.
pytestmark = pytest.mark.long

BUDGETS = {
    # kernel: registers, static shared bytes, bytes of spills; why
    # Three blocks of 256 threads and 80 registers fill an SM's 65,536 registers; a token needs one block. In the float8
    # instances the exact division's rare path is a call, around which ptxas saves up to three registers.
    "append_visual_kv_kernel": (80, 0, 16),
    # Four blocks of 256 threads; the sums of the LayerNorm are 8 floats.
    "condition_kernel": (64, 32, 0),
    # Ten blocks of 128 threads keep enough loads in flight for the memory's latency.
    "rank_one_kernel": (48, 0, 0),
    # Three blocks of 256 threads; a tile of 28x28 pixels at scale 3.5 takes 13 KB of (dynamic) shared memory and 10 KB
    # of source rows.
    "patch_kernel": (80, 0, 0),
    # Six blocks of 128 threads; a chunk of weights and sources (1 KB).
    "axis_kernel": (80, 1024, 0),
    # Eight blocks of 128 threads; the sums of 16 outputs' weights.
    "table_kernel": (64, 128, 0),
}
WIDTHS = {
    "append_visual_kv_kernel": 12,
    "condition_kernel": 6,
    "rank_one_kernel": 6,
    "patch_kernel": 4,
    "axis_kernel": 4,
    "table_kernel": 1,
}
"""Instances of each: types of q, caches and widths of access; types and widths; types."""


def declared() -> dict[str, str]:
    """The source file's stem of every `__global__` in csrc."""
    found = {}
    for path in sorted(SOURCES.rglob("*.cu*")):
        for name in re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([\w, ]+\)\s+)?(\w+)\(", path.read_text()):
            found[name] = path.stem
        assert path.read_text().count("__global__") == sum(stem == path.stem for stem in found.values()), path
    return found


def usages() -> list[nvcc.Usage]:
    return [usage for _, reports in nvcc.compiled().values() for usage in reports]


def test_every_kernel_has_a_budget():
    assert set(declared()) == set(BUDGETS) == set(WIDTHS)


def test_every_kernel_is_compiled_for_every_target():
    assert nvcc.TARGETS == ("sm_80", "sm_90a", "sm_100a", "sm_120")
    found = [(usage.kernel.split("<")[0], usage.target) for usage in usages()]
    for kernel, instances in WIDTHS.items():
        for target in nvcc.TARGETS:
            assert found.count((kernel, target)) == instances, f"{kernel} for {target}"
    assert {kernel for kernel, _ in found} == set(BUDGETS)
    assert "-gencode=arch=compute_90,code=compute_90" in setup.CUDA_TARGETS


@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_budgets(target):
    """Registers leave room for the blocks that hide latency, and next to nothing lives in local memory."""
    over = []
    for usage in usages():
        registers, shared, spills = BUDGETS[usage.kernel.split("<")[0]]
        if "Float8" not in usage.kernel:
            spills = 0
        within = usage.registers <= registers and usage.shared <= shared and max(usage.stack, usage.spills) <= spills
        if usage.target == target and not within:
            over.append(usage)
    assert not over, "\n".join(map(str, over))


def test_wide_accesses():
    """The aligned instances read and write 16 bytes at once; the others never more than an element."""
    code = nvcc.sass("append_visual_kv", "sm_90a")
    wide = {name: body for name, body in code.items() if not name.endswith(", 1>")}
    assert len(wide) == len(code) - len(wide) == 6
    for name, body in wide.items():
        assert "LDG.E.128" in body, name
        stored = "STG.E.128" if "Float8" not in name else "STG.E.64" if "float" not in name else "STG.E"
        assert stored in body, name
    for name in set(code) - set(wide):
        assert "LDG.E.128" not in code[name] and "STG.E.128" not in code[name], name
    rank_one = nvcc.sass("control_cross_attention", "sm_90a")
    for name, body in rank_one.items():
        assert ("LDG.E.128" in body) == name.endswith("true>"), name


@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_source_rows_are_staged_by_16_bytes(target):
    """From the image into shared memory; in the instance for pixels nothing else is read so."""
    for name, body in nvcc.sass("roi_patch_embed", target).items():
        if name.startswith("patch_kernel"):
            assert "LDG.E.128" in body and "STS.128" in body, name


@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_the_folded_weight_is_copied_by_16_bytes(target):
    for name, body in nvcc.sass("roi_patch_embed", target).items():
        if name.startswith("patch_kernel") and "unsigned char" not in name:
            assert re.search(r"LDG\.E\.128", body) and re.search(r"STG\.E\.128", body), name


@pytest.mark.parametrize(
    "source, waits, allows",
    (
        ("control_cross_attention", "rank_one_kernel", "condition_kernel"),
        ("roi_patch_embed", ("patch_kernel", "axis_kernel"), ("table_kernel", "axis_kernel")),
    ),
)
def test_chained_launches_wait(source, waits, allows):
    """ACQBULK (griddepcontrol.wait) stands before the first read of memory, PREEXIT lets the next kernel come early."""
    code = nvcc.sass(source, "sm_90a")
    for name, body in code.items():
        if name.startswith(waits):
            assert "ACQBULK" in body, name
            assert "LDG" not in body[: body.index("ACQBULK")], name
        assert ("PREEXIT" in body) == name.startswith(allows), name
    assert not any("ACQBULK" in body for body in nvcc.sass(source, "sm_80").values())


def test_coefficients_are_not_contracted():
    """Pillow rounds every product of a coefficient before it adds it; only named multiply-adds are fused."""
    assert "--fmad=false" in setup.NVCC_FLAGS
    for target in nvcc.TARGETS:
        for name, body in nvcc.sass("roi_patch_embed", target).items():
            # What resamples reads the coefficients of the one kernel that makes them.
            doubles = set(re.findall(r"\b(DMUL|DADD|DFMA|DSETP|MUFU\.RCP64H|I2F\.F64|F2I\.F64)", body))
            assert {"DMUL", "DADD"} <= doubles if name == "table_kernel" else not doubles, (name, target, doubles)
    for name, body in nvcc.sass("append_visual_kv", "sm_90a").items():
        assert "FMUL" in body and "FADD" in body, name


LOADS = """
import ctypes, sys, torch, vpt_kernels
from vpt_kernels.backends import CAPABILITIES
from vpt_kernels.library import OPS
has = lambda form: torch._C._dispatch_has_kernel_for_dispatch_key(f"vpt_kernels::{form}.cuda", "CUDA")
forms = {form: overloads for form, overloads in OPS.items()
         if "cuda" in CAPABILITIES[form.removesuffix("_into").removesuffix("_")]}
assert not any(has(form) for form in OPS), "already there"
torch_cuda = ctypes.CDLL(sys.argv[2])
torch.ops.load_library(sys.argv[1])
assert all(has(form) for form in forms)
for form, overloads in forms.items():
    of = {name: str(overload._schema).replace(f".{name}(", "(", 1) for name, overload in overloads.items()}
    assert of["cuda"] == of["reference"], of
print("registered", len(forms))
try:
    OPS["roi_patches"]["cuda"]([torch.zeros(2, 2, 3).byte()], torch.zeros(0, 24).int(), 0, 588)
except NotImplementedError as error:
    assert "CPU" in str(error)
    print("refused")
"""


def test_library_loads_without_a_gpu():
    """Linked against the stable ABI, it loads beside the CPU kernels, with what stands for libtorch_cuda in a CPU build
    or with that of a CUDA build, and registers every operator that has a CUDA form."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(nvcc.library()), str(nvcc.torch_cuda())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["registered 7", "refused"], done.stdout + done.stderr


def exported(library: Path) -> set[str]:
    listed = nvcc.run("nm", "-D", "--defined-only", "--format=posix", library).stdout
    return {line.split()[0].partition("@")[0] for line in listed.splitlines()}


def test_the_library_has_no_mmx_instruction():
    """They leave the process's long doubles broken; see `tests/native`."""
    assert not re.findall(r".*%mm[0-7].*", nvcc.run("objdump", "-d", nvcc.library()).stdout)


def test_library_names_what_it_needs():
    """libtorch_cuda is among them even where the linker drops what it thinks is not needed, and has every symbol.

    A weak symbol that nothing defines would be null, and its call a jump to null.
    """
    dynamic = nvcc.run("readelf", "-d", nvcc.library()).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed), needed
    undefined = nvcc.run("nm", "-D", "--undefined-only", "--format=posix", nvcc.library()).stdout
    kinds = {name: kind for name, kind in (line.split()[:2] for line in undefined.splitlines())}
    of_torch = {name for name in kinds if name.startswith(("aoti_", "torch_"))}
    assert not {name for name in of_torch if kinds[name] != "U"}
    weak = {name.partition("@")[0] for name, kind in kinds.items() if kind != "U"}
    assert weak <= {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    libraries = [TORCH / "lib" / name for name in ("libtorch_cpu.so", "libtorch.so", "libc10.so")]
    assert of_torch - set().union(*map(exported, [*libraries, nvcc.torch_cuda()])) == set()


STUBS = {"nothing": None, "all but one": nvcc.FROM_TORCH_CUDA[:1], "all": nvcc.FROM_TORCH_CUDA}
"""What a libtorch_cuda that stands for torch's has; where torch has its own, that one is taken."""
IN_PLACE = """
import ctypes, logging, sys
import torch
logging.basicConfig(format="LOG %(name)s %(message)s")
torch.version.cuda = "13.0"
for library in sys.argv[1:]:
    ctypes.CDLL(library)
from vpt_kernels import backends, env
print("CPU", backends.EXTENSION_PROBLEM)
print("CUDA", backends.CUDA_EXTENSION_PROBLEM)
print("CPU backend", backends.select("append_visual_kv", "auto", torch.device("cpu"), torch.float32))
print("CUDA backend", backends.reasons("append_visual_kv", torch.device("cuda"), torch.float32)["cuda"])
print(env.report())
"""


@pytest.mark.parametrize("torch_has", ("what is installed",) if nvcc.INSTALLED.exists() else STUBS)
def test_library_beside_the_cpu_kernels(tmp_path, torch_has):
    """`_C_cuda.so` is loaded where its file is; what torch lacks for it is a reason, and the CPU kernels stay."""
    package = tmp_path / "vpt_kernels"
    shutil.copytree(ROOT / "vpt_kernels", package, ignore=shutil.ignore_patterns("_C_cuda.so", "__pycache__"))
    shutil.copy(nvcc.library(), package / "_C_cuda.so")
    functions = STUBS.get(torch_has)
    preloaded = [] if functions is None else [str(nvcc.stub(tmp_path, functions))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_PLACE, *preloaded],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "CPU None" and said[2] == "CPU backend cpp", said
    notices = [line for line in done.stderr.splitlines() if line.startswith("LOG vpt_kernels")]
    if torch_has in ("all", "what is installed"):
        assert said[1] == "CUDA None" and said[3] == "CUDA backend None" and notices == []
    else:
        missing = "libtorch_cuda.so" if torch_has == "nothing" else "undefined symbol: torch_c10_cuda"
        assert missing in said[1] and missing in said[3]
        assert len(notices) == 1 and missing in notices[0] and "backend 'cuda'" in notices[0]
        assert any(line.startswith("CUDA kernels:") and missing in line for line in said)


def test_symbols_are_of_the_stable_abi():
    """What the library asks of torch is C functions of the shim: no C++ symbol of a particular version."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(nvcc.library())], capture_output=True, text=True, check=True
    ).stdout
    asked = [line.split()[-1] for line in listed.splitlines()]
    mangled = [name for name in asked if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert asked and not mangled, mangled
    foreign = [name for name in asked if "torch" in name and not name.startswith(("aoti_torch_", "torch_"))]
    assert not foreign, foreign


def modules(monkeypatch, torch_cuda: str | None) -> dict[str, setuptools.Extension]:
    """What setup.py builds for a torch of that CUDA release where a toolkit is installed, by name."""
    import torch.utils.cpp_extension as extension

    # torch names no CUDA_HOME on its CPU builds.
    monkeypatch.setattr(extension, "CUDA_HOME", "/usr/local/cuda" if torch_cuda else None)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.chdir(ROOT)
    return {module.name: module for module in setup.extensions()["ext_modules"]}


@pytest.mark.parametrize("torch_cuda", (None, "13.0"))
def test_cpu_library_has_no_cuda_code(monkeypatch, torch_cuda):
    found = modules(monkeypatch, torch_cuda)
    assert list(found) == ["vpt_kernels._C", "vpt_kernels._C_cuda"][: 1 if torch_cuda is None else 2]
    cpu = found["vpt_kernels._C"]
    assert not any("csrc/cuda" in source for source in cpu.sources)
    assert "-DUSE_CUDA" not in cpu.extra_compile_args["cxx"] and not any("cuda" in name for name in cpu.libraries)


@pytest.mark.parametrize("listed", (None, "9.0a"))
def test_a_cuda_torch_gets_every_target(monkeypatch, listed):
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    else:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    module = modules(monkeypatch, "13.0")["vpt_kernels._C_cuda"]
    expected = {f"csrc/cuda/{path.name}" for path in (SOURCES / "cuda").glob("*.c*") if path.suffix != ".cuh"}
    assert set(module.sources) == expected
    given = [flag for flag in module.extra_compile_args["nvcc"] if "gencode" in flag]
    assert given == ([] if listed else setup.CUDA_TARGETS)
    assert module.extra_link_args == setup.CUDA_LINK_FLAGS
