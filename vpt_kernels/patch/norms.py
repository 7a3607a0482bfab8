"""RMSNorms of the heads of q and k, whose weights `append_visual_kv_` takes instead of their calls."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from vpt_kernels.guard import part_of, why_every_module_is_called, why_part_called
from vpt_kernels.patch.supported import CENTRED_NORMS, HEAD_NORMS

NORMS = ("q_norm", "k_norm")
STAND_IN = "_vpt_as_it_is"
"""What a changed copy of an attention's forward looks up in the place of each norm."""


def as_it_is(x: Tensor) -> Tensor:
    """Return x, whose heads are normalised when they are rotated."""
    return x


def normalises(function: FunctionType) -> bool:
    """Return whether an attention's forward calls both norms itself, so that a copy of it can leave them out."""
    return set(NORMS) <= set(function.__code__.co_names)


def head_norms(module: Any, x: Tensor) -> tuple[dict[str, Any], str | None]:
    """Return what `append_visual_kv_` is told of an attention's norms, or why they must be called.

    Args:
        module: an attention with `q_norm` and `k_norm`.
        x: its input, whose dtype and device q and k share.

    The operator rounds where a norm of `HEAD_NORMS` rounds: the quotient, and the product with the weight. Norms of
    `CENTRED_NORMS` multiply by 1 + weight in float32 and round once, which is the same in float32 alone.
    """
    norms: list[Any] = [part_of(module, name) for name in NORMS]
    for name, norm in zip(NORMS, norms):
        reason = _why_called(module, name, norm, x)
        if reason is not None:
            return {}, reason
    if (reason := why_every_module_is_called()) is not None:
        return {}, reason
    weights = [norm._parameters["weight"] for norm in norms]
    if type(norms[0]) is not type(norms[1]) or _eps(norms[0]) != _eps(norms[1]):
        return {}, "its q_norm and k_norm are of two classes, or have two eps"
    if type(norms[0]).__name__ in CENTRED_NORMS:
        weights = [1.0 + weight for weight in weights]
    return dict(zip(NORMS, weights)) | {"norm_eps": _eps(norms[0])}, None


def _why_called(module: nn.Module, name: str, norm: Any, x: Tensor) -> str | None:
    kind = type(norm)
    if kind.__name__ not in HEAD_NORMS | CENTRED_NORMS or kind.__module__ != type(module).__module__:
        return f"its {name} is a {kind.__module__}.{kind.__name__}"
    reason = why_part_called(norm, kind, name, x)
    if reason is not None:
        return reason
    weight, head_dim = norm._parameters["weight"], module.head_dim
    if weight.dtype != x.dtype or weight.shape != (head_dim,) or not weight.is_contiguous():
        return f"its {name}'s weight is {weight.dtype} {list(weight.shape)}; heads are {x.dtype} [{head_dim}]"
    if x.dtype == torch.float64 or (kind.__name__ in CENTRED_NORMS and x.dtype != torch.float32):
        return f"its {name} rounds otherwise in {x.dtype}"
    eps = _eps(norm)
    if type(eps) is not float or not 0 <= eps < float("inf"):
        return f"its {name} has eps {eps!r}"
    return None


def _eps(norm: nn.Module) -> Any:
    return vars(norm).get((HEAD_NORMS | CENTRED_NORMS)[type(norm).__name__])
