"""What makes a layer do more than its weight says. Each takes the layer's parent and name, and multiplies by 1.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """As PEFT wraps a layer: it has the layer's name and shows its weight and bias."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        type(self).__name__ = type(base).__name__

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "base_layer" else getattr(self.base_layer, name)

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.base_layer(x)


class Times(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def offload(parent: nn.Module, name: str) -> None:
    """What accelerate's hook does: the weight is in its place during the call only."""
    part = getattr(parent, name)
    own, kept = part.forward, {key: value.data for key, value in part.named_parameters()}

    def place(device: str) -> None:
        for key, value in kept.items():
            part._parameters[key] = nn.Parameter(value.to(device), requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        place("cpu")
        try:
            return own(x)
        finally:
            place("meta")

    place("meta")
    part.forward = forward


def replace_forward(parent: nn.Module, name: str) -> None:
    part = getattr(parent, name)
    own = part.forward
    part.forward = lambda x: 1.5 * own(x)


def hook(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_hook(lambda _, __, out: 1.5 * out)


def pre_hook(parent: nn.Module, name: str) -> None:
    """Another order of the features: a layer norm would undo a factor and a shift."""
    getattr(parent, name).register_forward_pre_hook(lambda _, given: (1.5 * given[0].roll(1, -1),))


def adapt(parent: nn.Module, name: str) -> None:
    setattr(parent, name, Adapted(getattr(parent, name)))


def parametrise(parent: nn.Module, name: str) -> None:
    nn.utils.parametrize.register_parametrization(getattr(parent, name), "weight", Times())


def old_weight_norm(parent: nn.Module, name: str) -> None:
    part = getattr(parent, name)
    if part.weight.dim() > 1:
        nn.utils.weight_norm(part)
        part.weight_g.data.mul_(1.5)
    else:
        hook(parent, name)


def subclass(parent: nn.Module, name: str) -> None:
    part = getattr(parent, name)
    kind = type(part)
    part.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: 1.5 * kind.forward(self, x)})


def weight_subclass(parent: nn.Module, name: str) -> None:
    """A tensor that computes something else, as quantised and sharded weights do."""

    class Scaled(Tensor):
        @classmethod
        def __torch_function__(cls, function: Callable, types: Any, args: Any = (), named: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                out = function(*args, **(named or {}))
            layers = (torch.conv2d, torch.conv3d, nn.functional.layer_norm, nn.functional.linear, torch._C._nn.linear)
            return 1.5 * out if function in layers else out

    part = getattr(parent, name)
    part._parameters["weight"] = part.weight.detach().as_subclass(Scaled)


def compile_itself(parent: nn.Module, name: str) -> None:
    """What `Module.compile` sets, here to what a backend made of the layer."""
    part = getattr(parent, name)
    own = part.forward
    part._compiled_call_impl = lambda x: 1.5 * own(x)


def frozen_as_buffers(parent: nn.Module, name: str) -> None:
    part = getattr(parent, name)
    for key in tuple(part._parameters):
        value = part._parameters.pop(key)
        part.register_buffer(key, None if value is None else 1.5 * value)


CHANGES = (
    offload,
    replace_forward,
    hook,
    pre_hook,
    adapt,
    parametrise,
    old_weight_norm,
    subclass,
    weight_subclass,
    compile_itself,
    frozen_as_buffers,
)
