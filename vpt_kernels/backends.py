"""Which implementation runs, and why."""

from __future__ import annotations

import glob
import logging
import os
from dataclasses import dataclass

import torch

from vpt_kernels.library import BACKENDS, OPS

logger = logging.getLogger("vpt_kernels")


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run this call; the message lists the reasons."""


@dataclass(frozen=True)
class Capability:
    """What one backend of one operator supports. `devices=None` means every device."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]


_CPP = Capability(("cpu",), (torch.float32, torch.bfloat16, torch.float16))
_REFERENCE = Capability(None, (torch.float64, torch.float32, torch.bfloat16, torch.float16))
CAPABILITIES: dict[str, dict[str, Capability]] = {
    "roi_patches": {
        "cpp": Capability(("cpu",), (torch.uint8,)),
        "reference": Capability(None, (torch.uint8,)),
    },
    "roi_patch_embed": {"cpp": _CPP, "reference": _REFERENCE},
    "control_cross_attention": {"cpp": _CPP, "reference": _REFERENCE},
    "append_visual_kv": {"cpp": _CPP, "reference": _REFERENCE},
}
"""`CAPABILITIES[operator][backend]`; the `_into` and in-place forms share their operator's row."""


def _load_extension() -> str | None:
    """Load the compiled extension; return None when its operators are registered, else the reason."""
    paths = glob.glob(os.path.join(os.path.dirname(__file__), "_C*.so"))
    if not paths:
        return "the C++ extension was not built (run `python -m vpt_kernels.env` for what is missing)"
    try:
        torch.ops.load_library(paths[0])
    except (OSError, RuntimeError) as error:
        return f"the C++ extension {os.path.basename(paths[0])} cannot be loaded: {error}"
    return None


EXTENSION_PROBLEM = _load_extension()
"""None when the C++ extension is loaded, else why it is not."""

if EXTENSION_PROBLEM is not None:
    logger.warning("backend 'auto' falls back to 'reference': %s", EXTENSION_PROBLEM)


def _reason(capability: Capability, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "cpp" and EXTENSION_PROBLEM is not None:
        return EXTENSION_PROBLEM
    if capability.devices is not None and device.type not in capability.devices:
        return f"it runs on {'/'.join(capability.devices)}, the tensors are on {device.type}"
    if dtype not in capability.dtypes:
        return f"it computes in {', '.join(str(d) for d in capability.dtypes)}, the tensors are {dtype}"
    return None


def reasons(operator: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each backend of `operator`: None if it can run on `device` in `dtype`, else why not."""
    return {name: _reason(row, name, device, dtype) for name, row in CAPABILITIES[operator].items()}


def select(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs `operator` for tensors of `dtype` on `device`.

    Raises:
        ValueError: `backend` is not a known name.
        BackendUnavailable: an explicit `backend` cannot run here, or none can.
    """
    table = CAPABILITIES[operator]
    if backend == "auto":
        for name, capability in table.items():
            if _reason(capability, name, device, dtype) is None:
                return name
    elif backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose 'auto' or one of {BACKENDS}")
    elif _reason(table[backend], backend, device, dtype) is None:
        return backend
    found = reasons(operator, device, dtype)
    shown = found if backend == "auto" else {backend: found[backend]}
    listed = "; ".join(f"{name}: {why}" for name, why in shown.items())
    raise BackendUnavailable(f"{operator}: no usable backend for backend={backend!r} ({listed})")


def bind(operator: str, form: str, backend: str, device: torch.device, dtype: torch.dtype) -> torch._ops.OpOverload:
    """The overload of `form` (the operator itself, its `_into` or in-place form) that `select` chooses."""
    return OPS[form][select(operator, backend, device, dtype)]


def explain(operator: str, *tensors: torch.Tensor, backend: str = "auto") -> str:
    """Print, and return, which backend would run `operator` on these tensors, and why the others would not.

    Args:
        operator: "roi_patches", "roi_patch_embed", "control_cross_attention" or "append_visual_kv".
        tensors: the call's tensors, or any one on the same device and of the same dtype; default: a float32
            CPU tensor (uint8 for `roi_patches`).
        backend: as given to the operator.

    Raises:
        ValueError: `operator` is not a known name.
    """
    if operator not in CAPABILITIES:
        raise ValueError(f"operator is {operator!r}; choose one of {tuple(CAPABILITIES)}")
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
