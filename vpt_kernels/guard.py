"""The one question behind every weight that is read instead of called: would the call do exactly that?

It is asked in every call, because hooks, adapters, offloading and copies come and go between calls. It costs 1 to 2 µs:
attributes that `nn.Module` computes cost half as much each, so that only plain dictionaries are looked into.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _every
from torch.utils._device import DeviceContext


class OwnForward(Exception):  # noqa: N818  (no error: it says whose turn it is)
    """This call belongs to the module's own forward; the message is the reason. Nothing was computed yet."""


_PLAIN = (nn.Parameter, Tensor)
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_RUNS: dict[Any, str] = {nn.Conv2d: "conv2d", nn.Conv3d: "conv3d", nn.Linear: "linear", nn.LayerNorm: "layer_norm"}
_FORWARDS = {
    kind: (kind.forward, getattr(kind, "_conv_forward", None), name, getattr(F, name)) for kind, name in _RUNS.items()
}
"""What a call of a plain layer runs, as torch defines it."""


def part_of(module: nn.Module, name: str) -> object:
    """Return `getattr(module, name, None)` without what `nn.Module` spends on looking a part up."""
    return module._modules[name] if name in module._modules else getattr(module, name, None)


def why_called(part: Any, kind: Any, name: str, x: Tensor | None = None) -> str | None:
    """Return why `part` must be called, or None where reading its weight and bias does what calling it would do.

    Args:
        part: the module whose call would be bypassed.
        kind: the plain layer that it must be: torch's Conv2d, Conv3d, Linear or LayerNorm, or a norm of transformers.
        name: what the reason calls it.
        x: its input, whose device the weights must share; None where that is checked elsewhere.
    """
    reason = why_part_called(part, kind, name, x)
    return reason if reason is not None or torch.compiler.is_compiling() else why_every_module_is_called()


def why_part_called(part: Any, kind: Any, name: str, x: Tensor | None = None) -> str | None:
    """Do what `why_called` does but for what concerns all modules, which a call that reads several parts asks once."""
    if type(part) is not kind:
        # Adapters, parametrisations and sharding exchange the class; some keep its name.
        found = type(part).__name__
        found = found if found != kind.__name__ else f"{type(part).__module__}.{found}"
        return f"its {name} is a {found}, not a plain {kind.__name__}"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"its {name} has hooks, which would be skipped"
    own = part.__dict__
    held: dict[str, Any] = part._parameters
    if "_conv_forward" in own or "_call_impl" in own or ("forward" in own and not is_own_forward(part)):
        return f"its {name} has a forward of its own, as offloading gives it"
    if "_compiled_call_impl" in own:
        return f"its {name} was compiled by itself"
    if "_is_replica" in own:
        return f"its {name} is a replica's"
    if "weight" in own or "bias" in own or "weight" not in held or ("bias" not in held and kind in _RUNS):
        return f"its {name}'s weights are no parameters of it"
    weight, bias = held["weight"], held.get("bias")
    if type(weight) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return f"its {name} has a {type(weight).__name__} as weight and a {type(bias).__name__} as bias"
    if weight.layout is not torch.strided:
        return f"its {name}'s weight is {weight.layout}"
    if x is not None and type(x) not in _PLAIN:
        return f"its input is a {type(x).__name__}"
    if weight.is_meta or (bias is not None and bias.is_meta) or (x is not None and weight.device != x.device):
        return f"its {name}'s weight lies on {weight.device} between calls"
    if torch.compiler.is_compiling():
        # By torch's own rule a compiled graph is made for the classes and hooks for all that there were.
        return None
    if kind in _FORWARDS:
        forward, convolve, function, runs = _FORWARDS[kind]
        replaced = kind.forward is not forward or getattr(F, function) is not runs
        replaced |= convolve is not None and kind._conv_forward is not convolve
    else:
        replaced = not (_is_defined_by(kind, "forward") and _is_defined_by(kind, "_norm"))
    return f"the forward of every {kind.__name__} was replaced" if replaced else None


def _is_defined_by(kind: Any, name: str) -> bool:
    """Return whether the class has no such method, or the one that stands in it where it is defined."""
    method = kind.__dict__.get(name)
    if method is None:
        return not hasattr(kind, name)
    names = getattr(method, "__globals__", {})
    return names.get("__name__") == kind.__module__ and method.__qualname__ == f"{kind.__qualname__}.{name}"


def is_own_forward(module: nn.Module) -> bool:
    """Return whether the `forward` among the module's attributes is its class's, as removed hooks leave it behind."""
    forward = module.__dict__["forward"]
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def keeps_outputs(part: Any) -> bool:
    """Return whether a hook of the module, of one inside it, or one for all, may keep what its call returns."""
    if part._forward_hooks or _every._global_forward_hooks:
        return True
    return bool(part._modules) and any(inner._forward_hooks for inner in part.modules())


def why_every_module_is_called() -> str | None:
    """Return why no module's call may be bypassed now, or None: the calls of all are watched, traced or replaced."""
    if (
        _every._global_forward_hooks
        or _every._global_forward_pre_hooks
        or _every._global_backward_hooks
        or _every._global_backward_pre_hooks
    ):
        return "there are hooks for all modules"
    if nn.Module.__call__ is not _CALL or nn.Module._call_impl is not _CALL_IMPL:
        return "the calls of all modules were replaced, as torch.fx does to trace"
    return why_watched()


def why_watched() -> str | None:
    """Return why every function of torch must be called as it stands, or None: somebody transforms, traces or replaces
    them all.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if torch._C._len_torch_function_stack() and (mode := _function_mode()) is not None:
        return f"the mode {mode} sees every function"
    if torch._C._len_torch_dispatch_stack():
        return f"the mode {type(torch._C._get_dispatch_stack_at(0)).__name__} sees every operator"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "torch.jit.trace" if torch._C._get_tracing_state() is not None else None


def _function_mode() -> str | None:
    """Return the innermost mode of `__torch_function__` that does more than to choose a device for new tensors."""
    modes = (torch._C._get_function_stack_at(n) for n in reversed(range(torch._C._len_torch_function_stack())))
    return next((type(mode).__name__ for mode in modes if type(mode) is not DeviceContext), None)
