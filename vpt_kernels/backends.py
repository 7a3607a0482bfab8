"""Which implementation runs, and why."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpt_kernels.checks import require_choice, require_type, shown
from vpt_kernels.library import BACKENDS, OPS

logger = logging.getLogger("vpt_kernels")


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run this call; the message lists the reasons."""


@dataclass(frozen=True)
class Capability:
    """What one backend of one operator supports. `devices=None` means every device."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs its kernels on the CPU: for tests, and only when backend="triton" is asked for."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CPP = Capability(("cpu",), _FLOATS)
_CUDA = Capability(("cuda",), _FLOATS)
_TRITON = Capability(("cuda", "cpu") if INTERPRETED else ("cuda",), _FLOATS)
_REFERENCE = Capability(None, (torch.float64, *_FLOATS))
CAPABILITIES: dict[str, dict[str, Capability]] = {
    "roi_patches": {
        "cuda": Capability(_CUDA.devices, (torch.uint8,)),
        "triton": Capability(_TRITON.devices, (torch.uint8,)),
        "cpp": Capability(_CPP.devices, (torch.uint8,)),
        "reference": Capability(None, (torch.uint8,)),
    },
    "roi_patch_embed": {"triton": _TRITON, "cuda": _CUDA, "cpp": _CPP, "reference": _REFERENCE},
    "control_cross_attention": {"cuda": _CUDA, "triton": _TRITON, "cpp": _CPP, "reference": _REFERENCE},
    "append_visual_kv": {"cuda": _CUDA, "triton": _TRITON, "cpp": _CPP, "reference": _REFERENCE},
    "cached_attention": {"cpp": _CPP, "reference": _REFERENCE},
    "packed_linear": {"cpp": _CPP, "reference": _REFERENCE},
}
"""`CAPABILITIES[operator][backend]`, in the order in which `backend="auto"` tries them; the `_into` and in-place forms
share their operator's row. What a call's other arguments rule out is for the operator to decline, see `bind`."""


_NOT_BUILT = "was not built (run `python -m vpt_kernels.env` for what is missing)"


def _load(name: str) -> str | None:
    """Load one of the package's libraries; return None when its operators are registered, else the reason."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        return f"the C++ extension {_NOT_BUILT}" if name == "_C.so" else _cuda_not_built()
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # torch's own words name the file alone; the loader's, behind them, what is missing.
        return f"the extension {name} cannot be loaded: {error.__cause__ or error}"
    return None


def _cuda_not_built() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    # Only where something is missing: it asks nvcc for its version.
    from vpt_kernels.toolkit import toolkit_problem

    return f"the CUDA extension {_NOT_BUILT}: {toolkit_problem(torch.version.cuda) or 'the toolkit is here: rebuild'}"


EXTENSION_PROBLEM = _load("_C.so")
"""None when the CPU kernels are loaded, else why they are not."""

CUDA_EXTENSION_PROBLEM = _load("_C_cuda.so")
"""None when the CUDA kernels are loaded, else why they are not; neither library needs the other."""


def _notice() -> str | None:
    """Return what is missing and could be here, in one line."""
    parts = []
    if EXTENSION_PROBLEM is not None:
        parts.append(f"backend 'auto' falls back to 'reference' on a CPU: {EXTENSION_PROBLEM}")
    if CUDA_EXTENSION_PROBLEM is not None and torch.version.cuda is not None:
        parts.append(f"backend 'cuda' is not available: {CUDA_EXTENSION_PROBLEM}")
    return "; ".join(parts) or None


if (_missing := _notice()) is not None:
    logger.warning("%s", _missing)


def _reason(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why `backend` cannot run `operator`, or None; the cheap questions first."""
    capability = CAPABILITIES[operator].get(backend)
    if capability is None:
        return f"{operator} is for CPUs: it has no such implementation"
    if capability.devices is not None and device.type not in capability.devices:
        return f"it runs on {'/'.join(capability.devices)}, the tensors are on {device.type}"
    if dtype not in capability.dtypes:
        return f"it computes in {', '.join(str(d) for d in capability.dtypes)}, the tensors are {dtype}"
    if backend == "cpp" and EXTENSION_PROBLEM is not None:
        return EXTENSION_PROBLEM
    if backend == "cuda" and CUDA_EXTENSION_PROBLEM is not None:
        return CUDA_EXTENSION_PROBLEM
    if backend == "triton" and not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton, Linux only)"
    return None


# A folder that happens to be called triton has no origin.
_TRITON_INSTALLED = getattr(importlib.util.find_spec("triton"), "origin", None) is not None
_NOTHING: Mapping[str, str] = {}


def reasons(
    operator: str, device: torch.device, dtype: torch.dtype, declined: Mapping[str, str] = _NOTHING
) -> dict[str, str | None]:
    """Return for each backend of `operator` None if it can run on `device` in `dtype`, else why it cannot."""
    names = dict.fromkeys((*CAPABILITIES[operator], *BACKENDS))
    return {name: _reason(operator, name, device, dtype) or declined.get(name) for name in names}


def select(
    operator: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    declined: Mapping[str, str] = _NOTHING,
) -> str:
    """Return the backend that runs `operator` for tensors of `dtype` on `device`.

    Args:
        declined: why this call, for its other arguments, cannot run on a backend that otherwise could.

    Raises:
        ValueError: `backend` is not a known name.
        BackendUnavailable: an explicit `backend` cannot run here, or none can.
    """
    table = CAPABILITIES[operator]
    if backend == "auto":
        for name in table:
            if name in declined or (name == "triton" and device.type == "cpu"):
                continue
            if _reason(operator, name, device, dtype) is None:
                if name == "reference" and device.type == "cuda":
                    listed = _listed(reasons(operator, device, dtype, declined))
                    logger.warning("%s: backend 'auto' falls back to 'reference' on a GPU (%s)", operator, listed)
                return name
    elif backend not in BACKENDS:
        raise ValueError(f"backend is {shown(backend)}; choose 'auto' or one of {BACKENDS}")
    elif backend not in declined and _reason(operator, backend, device, dtype) is None:
        return backend
    found = reasons(operator, device, dtype, declined)
    asked = found if backend == "auto" else {backend: found[backend]}
    raise BackendUnavailable(f"{operator}: no usable backend for backend={backend!r} ({_listed(asked)})")


def _listed(found: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in found.items() if why is not None)


_TRITON_MODULES = {
    "roi_patches": "vpt_kernels.roi_patch_embed.triton",
    "roi_patch_embed": "vpt_kernels.roi_patch_embed.triton",
    "control_cross_attention": "vpt_kernels.control_cross_attention.triton",
    "append_visual_kv": "vpt_kernels.append_visual_kv.triton",
}
_chosen: dict[tuple[object, ...], str] = {}


def _choose(operator: str, backend: str, device: torch.device, dtype: torch.dtype, declined: Mapping[str, str]) -> str:
    """Return what `select` returns, and remember it; the first call imports what registers a Triton implementation."""
    # Words and imports cost microseconds; nothing but these decides, and none of it changes in a process.
    key = (operator, backend, device.type, dtype, *declined)
    try:
        name = _chosen.get(key)
    except (TypeError, ValueError):  # a memoryview says that it has no hash by a ValueError
        raise TypeError(f"backend is a {type(backend).__name__}; choose 'auto' or one of {BACKENDS}") from None
    if name is None:
        name = select(operator, backend, device, dtype, declined)
        if name == "triton":
            importlib.import_module(_TRITON_MODULES[operator])
        _chosen[key] = name
    return name


# What torch.compiler.assume_constant_result sets: a compiled graph must not trace an import. The decorator itself
# would import the compiler, a second for every program that only calls an operator.
vars(_choose)["_dynamo_marked_constant"] = True


def bind(
    operator: str,
    form: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    declined: Mapping[str, str] = _NOTHING,
) -> torch._ops.OpOverload:
    """Return the overload of `form` (the operator itself, its `_into` or in-place form) that `select` chooses."""
    return OPS[form][_choose(operator, backend, device, dtype, declined)]


def call(overload: torch._ops.OpOverload, *arguments: Any) -> Any:
    """Return `overload(*arguments)`; what its library finds wrong in the values is a ValueError.

    A C++ library's std::out_of_range is an IndexError in every version of torch, and stays one in a compiled graph; its
    other kinds are a RuntimeError from torch 2.15 on.
    """
    try:
        return overload(*arguments)
    except IndexError as error:
        raise ValueError(str(error)) from None


def explain(operator: str, *tensors: torch.Tensor, backend: str = "auto") -> str:
    """Print, and return, which backend would run `operator` on these tensors, and why the others would not.

    Args:
        operator: "roi_patches", "roi_patch_embed", "control_cross_attention", "append_visual_kv",
            "cached_attention" or "packed_linear".
            What only a call's other arguments rule out (a form of a projector, float8 caches) is not known here; the
            call says it.
        tensors: the call's tensors, or any one on the same device and of the same dtype; default: a float32
            CPU tensor (uint8 for `roi_patches`).
        backend: as given to the operator.

    Raises:
        ValueError: `operator` is not a known name.
    """
    require_choice("operator", operator, tuple(CAPABILITIES))
    require_choice("backend", backend, ("auto", *BACKENDS))
    for tensor in tensors:
        require_type("one of tensors", tensor, torch.Tensor, "a torch.Tensor")
    default = torch.uint8 if operator == "roi_patches" else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    dtypes = [t.dtype for t in tensors if t.is_floating_point()]
    dtype = torch.uint8 if operator == "roi_patches" else (dtypes[0] if dtypes else default)
    try:
        chosen = select(operator, backend, device, dtype)
    except BackendUnavailable:
        chosen = None
    lines = [f"{operator} on {device} in {dtype}, backend={backend!r}: {chosen or 'none can run'}"]
    for name, why in reasons(operator, device, dtype).items():
        state = "chosen" if name == chosen else "can run" if why is None else f"cannot run: {why}"
        lines.append(f"  {name:<10} {state}")
    text = "\n".join(lines)
    print(text)
    return text
