"""Which implementation runs, and what is said about it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vpt_kernels
from tests.helpers import BACKENDS, CLIP_MEAN, CLIP_STD, noise, normal
from tests.kernels.append_inputs import make
from tests.kernels.control_inputs import fold
from vpt_kernels import (
    BackendUnavailable,
    append_visual_kv,
    append_visual_kv_,
    cached_attention,
    control_cross_attention,
    control_cross_attention_into,
    explain,
    fold_patch_weight,
    pack_weight,
    packed_linear,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
)
from vpt_kernels.backends import reasons, select
from vpt_kernels.library import BACKENDS as ALL_BACKENDS

OPERATORS = ("roi_patches", "roi_patch_embed", "control_cross_attention", "append_visual_kv")
"""Those of every device; `cached_attention` and `packed_linear` are for CPUs."""


def calls(dtype: torch.dtype, device: str = "cpu") -> dict[str, Callable]:
    """Every public function, with everything but the backend."""
    images = [noise(30, 40).to(device)]
    plan = plan_regions([(30, 40)], [(0, 0, 0, 40, 30)], qwen2_vl_policy())
    embed = fold_patch_weight(normal(5, 3, 14, 14, key="b", dtype=dtype).to(device), CLIP_MEAN, CLIP_STD)
    tokens = torch.zeros(plan.rows, 5, dtype=dtype, device=device)
    projector = fold("identity", 12, dtype=dtype)
    features, control = normal(4, 12, key="f", dtype=dtype), normal(1, 12, key="c", dtype=dtype)
    out, rows = torch.zeros(4, 12, dtype=dtype), torch.arange(4)
    append = make(3, dtype=dtype)
    heads = normal(2, 2, 8, key="h", dtype=dtype)
    x, weight = normal(2, 6, key="x", dtype=dtype), pack_weight(normal(5, 6, key="w"), "bfloat16")
    return {
        "roi_patches": lambda backend: roi_patches(images, plan, backend=backend),
        "roi_patch_embed": lambda backend: roi_patch_embed(images, plan, embed, backend=backend),
        "roi_patch_embed_into": lambda backend: roi_patch_embed_into(images, plan, embed, tokens, backend=backend),
        "control_cross_attention": lambda backend: control_cross_attention(
            features, control, projector, backend=backend
        ),
        "control_cross_attention_into": lambda backend: control_cross_attention_into(
            features, control, projector, out, rows, backend=backend
        ),
        "append_visual_kv": lambda backend: append_visual_kv(*append.tensors(), append.sections, backend=backend),
        "append_visual_kv_": lambda backend: append_visual_kv_(*append.tensors(), append.sections, backend=backend),
        "cached_attention": lambda backend: cached_attention(heads, heads, heads, backend=backend),
        "packed_linear": lambda backend: packed_linear(x, weight, backend=backend),
        "packed_linear_into": lambda backend: packed_linear(x, weight, out=x.new_empty(2, 5), backend=backend),
    }


FORMS = tuple(calls(torch.float32))


class Recorder(TorchDispatchMode):
    """The overloads of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vpt_kernels":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def ran(form: str, dtype: torch.dtype, backend: str) -> list[str]:
    call = calls(dtype)[form]
    with Recorder() as recorder:
        call(backend)
    return recorder.names


@pytest.mark.parametrize("form", FORMS)
def test_an_explicit_backend_runs(form):
    for backend in BACKENDS:
        assert ran(form, torch.float32, backend) == [f"vpt_kernels.{form}.{backend}"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_auto_prefers_the_compiled_one(form, dtype):
    assert ran(form, dtype, "auto") == [f"vpt_kernels.{form}.cpp"]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "roi_patches"])
def test_auto_falls_back_for_doubles(form):
    assert ran(form, torch.float64, "auto") == [f"vpt_kernels.{form}.reference"]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "roi_patches"])
def test_an_explicit_backend_is_never_replaced(form):
    with pytest.raises(BackendUnavailable) as raised:
        calls(torch.float64)[form]("cpp")
    for text in ("cpp", "float64", "float32", form.removesuffix("_into").rstrip("_")):
        assert text in str(raised.value)


@pytest.mark.parametrize("form", ("roi_patches", "roi_patch_embed", "roi_patch_embed_into"))
def test_other_devices_are_named(form):
    with pytest.raises(BackendUnavailable) as raised:
        calls(torch.float32, "meta")[form]("cpp")
    for text in ("cpp", "meta", "cpu"):
        assert text in str(raised.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ("Triton", "gpu", "CPP", "", None))
def test_unknown_backends(form, backend):
    with pytest.raises(ValueError) as raised:
        calls(torch.float32)[form](backend)
    assert not isinstance(raised.value, BackendUnavailable)
    for text in (repr(backend), "auto", *ALL_BACKENDS):
        assert text in str(raised.value)


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith(("cached", "packed"))])
@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_gpu_backends_refuse_cpu_tensors(form, backend):
    with pytest.raises(BackendUnavailable) as raised:
        calls(torch.float32)[form](backend)
    assert f"{backend}: it runs on cuda, the tensors are on cpu" in str(raised.value)
    (other,) = {"triton", "cuda"} - {backend}
    assert f"{other}:" not in str(raised.value)


@pytest.mark.parametrize("operator", ("cached_attention", "packed_linear"))
@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_an_operator_for_cpus_has_no_gpu_backends(backend, operator):
    """The dtype and the device are not the reason, and `auto` takes what there is on any device."""
    with pytest.raises(BackendUnavailable, match=f"{backend}: {operator} is for CPUs"):
        calls(torch.float32)[operator](backend)
    found = reasons(operator, torch.device("cpu"), torch.float32)
    assert set(found) == set(ALL_BACKENDS) and found["cpp"] is None and found["reference"] is None
    assert select(operator, "auto", CUDA, torch.bfloat16) == "reference"


CUDA = torch.device("cuda")
IS_GPU_BUILD = torch._C._dispatch_has_kernel_for_dispatch_key("vpt_kernels::append_visual_kv.cuda", "CUDA")


@pytest.mark.skipif(IS_GPU_BUILD, reason="this extension was built with CUDA; the test is about one that was not")
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gpu_without_the_cuda_extension(operator):
    """Nothing here touches a GPU: the choice needs the tensors' device, dtype and what was built."""
    dtype = torch.uint8 if operator == "roi_patches" else torch.bfloat16
    found = reasons(operator, CUDA, dtype)
    missing = "not built|built without CUDA"  # by what torch is
    assert set(found) == set(ALL_BACKENDS) and re.search(missing, found["cuda"])
    assert found["triton"] is None and found["reference"] is None and "cpu" in found["cpp"]
    assert select(operator, "auto", CUDA, dtype) == "triton"
    with pytest.raises(BackendUnavailable, match=missing):
        select(operator, "cuda", CUDA, dtype)


def test_what_a_call_declines(caplog):
    """A reason of the call itself is as good as one of the machine: no explicit choice overrides it."""
    declined = {"triton": "it has no square form"}
    assert select("append_visual_kv", "auto", CUDA, torch.float16, declined) in ("cuda", "reference")
    with pytest.raises(BackendUnavailable, match="triton: it has no square form"):
        select("append_visual_kv", "triton", CUDA, torch.float16, declined)
    assert select("append_visual_kv", "reference", CUDA, torch.float16, declined) == "reference"
    assert reasons("append_visual_kv", CUDA, torch.float16, declined)["triton"] == "it has no square form"
    everything = {name: "no" for name in ALL_BACKENDS}
    with pytest.raises(BackendUnavailable, match="reference: no"):
        select("append_visual_kv", "auto", torch.device("cpu"), torch.float32, everything)
    caplog.clear()
    assert select("append_visual_kv", "auto", CUDA, torch.float64) == "reference"
    assert "falls back" in caplog.text and "float64" in caplog.text


def test_triton_is_imported_when_it_is_chosen_only():
    """Importing it takes longer than everything else here together."""
    program = "import sys, vpt_kernels as v; v.explain('append_visual_kv'); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr


@pytest.mark.parametrize("operator", OPERATORS)
def test_explain_prints_the_choice(operator, capsys):
    text = explain(operator)
    assert capsys.readouterr().out.strip() == text.strip()
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert operator in text.splitlines()[0] and set(lines) == set(ALL_BACKENDS)
    assert "chosen" in lines["cpp"] and "can run" in lines["reference"]
    assert all("cannot run: it runs on cuda" in lines[name] for name in ("cuda", "triton"))


def test_explain_gives_reasons(capsys):
    text = explain("append_visual_kv", torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.float64))
    assert "float64" in text.splitlines()[0]
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert "cannot run" in lines["cpp"] and "float64" in lines["cpp"] and "chosen" in lines["reference"]
    text = explain("control_cross_attention", torch.zeros(2, device="meta"))
    assert "meta" in text and "cpu" in text
    assert "reference" in explain("roi_patches", backend="reference").splitlines()[0]
    capsys.readouterr()


def test_explain_refuses_unknown_names():
    with pytest.raises(ValueError) as raised:
        explain("resize")
    for text in ("resize", *OPERATORS):
        assert text in str(raised.value)
    with pytest.raises(ValueError, match="Triton"):
        explain("roi_patches", backend="Triton")
    assert "none can run" in explain("roi_patches", backend="triton").splitlines()[0]


def without_extension(folder: Path, library: bytes | None) -> str:
    """Standard output and error of a process that uses a copy of the package without, or with a broken, extension."""
    package = Path(vpt_kernels.__file__).parent
    shutil.copytree(package, folder / "vpt_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (folder / "vpt_kernels" / "_C.so").write_bytes(library)
    program = """
import logging
logging.basicConfig(format="LOG %(name)s %(message)s")
import torch
import vpt_kernels as vpt
print("FILE", vpt.__file__)
table = vpt.rotary_table(8, 8)
def append(backend):
    q, kv, cache = torch.ones(2, 2, 8), torch.ones(2, 1, 8), torch.zeros(4, 1, 8)
    places = torch.zeros(3, 2, dtype=torch.int64), torch.arange(2)
    vpt.append_visual_kv(q, kv, kv, table, *places, cache, cache.clone(), (1, 1, 2), backend=backend)
append("auto")
append("auto")
append("reference")
vpt.explain("append_visual_kv")
try:
    append("cpp")
except vpt.BackendUnavailable as error:
    print("UNAVAILABLE", error)
"""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"FILE {folder}" in done.stdout
    return done.stdout + done.stderr


@pytest.mark.parametrize("library", (None, b"\x7fELF not a library"), ids=("missing", "broken"))
def test_without_the_extension(tmp_path, library):
    """One line in the log, then the reference; an explicit choice is refused with the reason and the remedy."""
    text = without_extension(tmp_path, library)
    logged = [line for line in text.splitlines() if line.startswith("LOG vpt_kernels")]
    assert len(logged) == 1 and "reference" in logged[0]
    (refused,) = [line for line in text.splitlines() if line.startswith("UNAVAILABLE")]
    reason = "python -m vpt_kernels.env" if library is None else "_C.so cannot be loaded"
    assert reason in refused and reason in logged[0]
    assert "reference  chosen" in text and "cpp        cannot run" in text


def test_the_extension_is_there():
    """A build that failed must not pass unnoticed."""
    assert list(Path(vpt_kernels.__file__).parent.glob("_C*.so"))
    done = subprocess.run([sys.executable, "-m", "vpt_kernels.env"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
