"""The one question behind every weight that is read instead of called: would the call do exactly that?

It is asked in every call, because hooks, adapters, offloading and copies come and go between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _every


class OwnForward(Exception):  # noqa: N818  (no error: it says whose turn it is)
    """This call belongs to the module's own forward; the message is the reason. Nothing was computed yet."""


_PLAIN = (nn.Parameter, Tensor)
_CALL = nn.Module.__call__, nn.Module._call_impl
_FORWARDS = {
    kind: (kind.forward, getattr(kind, "_conv_forward", None))
    for kind in (nn.Conv2d, nn.Conv3d, nn.Linear, nn.LayerNorm)
}
"""What a call of a plain layer runs, as torch defines it."""


def why_called(part: nn.Module, kind: type[nn.Module], name: str, x: Tensor | None = None) -> str | None:
    """Why `part` must be called, or None where reading its weight and bias does what calling it would do.

    Args:
        part: the module whose call would be bypassed.
        kind: the plain layer that it must be: torch's Conv2d, Conv3d, Linear or LayerNorm.
        name: what the reason calls it.
        x: its input, whose device the weights must share; None where that is checked elsewhere.
    """
    if type(part) is not kind:
        # Adapters, parametrisations and sharding exchange the class; some keep its name.
        found = type(part).__name__
        found = found if found != kind.__name__ else f"{type(part).__module__}.{found}"
        return f"its {name} is a {found}, not a plain {kind.__name__}"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"its {name} has hooks, which one GEMM would skip"
    weight, bias = part.weight, part.bias
    if type(weight) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return f"its {name} has a {type(weight).__name__} as weight and a {type(bias).__name__} as bias"
    if torch.compiler.is_compiling():
        # By torch's own rule a compiled graph is made for the hooks and forwards that there were.
        return None
    if weight.is_meta or (x is not None and weight.device != x.device):
        return f"its {name}'s weight lies on {weight.device} between calls"
    own = part.__dict__
    if "_conv_forward" in own or ("forward" in own and not is_own_forward(part)):
        return f"its {name} has a forward of its own, as offloading gives it"
    if "_is_replica" in own:
        return f"its {name} is a replica's"
    if (kind.forward, getattr(kind, "_conv_forward", None)) != _FORWARDS[kind]:
        return f"the forward of every {kind.__name__} was replaced"
    return why_every_module_is_called()


def is_own_forward(module: nn.Module) -> bool:
    """Whether the `forward` among the module's attributes is its class's, as removed hooks leave it behind."""
    forward = module.__dict__["forward"]
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def why_every_module_is_called() -> str | None:
    """Why no module's call may be bypassed now, or None: the calls of all are watched, traced or replaced."""
    if (
        _every._global_forward_hooks
        or _every._global_forward_pre_hooks
        or _every._global_backward_hooks
        or _every._global_backward_pre_hooks
    ):
        return "there are hooks for all modules"
    if (nn.Module.__call__, nn.Module._call_impl) != _CALL:
        return "the calls of all modules were replaced, as torch.fx does to trace"
    return "torch.jit.trace" if torch.jit.is_tracing() else None
