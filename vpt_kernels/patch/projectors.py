"""The published re-encoder's projectors through `control_cross_attention`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from vpt_kernels.control_cross_attention.api import ControlProjector, control_cross_attention, fold_projector
from vpt_kernels.guard import OwnForward, part_of, why_called, why_every_module_is_called, why_part_called
from vpt_kernels.patch.rules import Forward, Rule, Serve, folded, lacks, record
from vpt_kernels.patch.supported import FORMS

_EPS = 1e-5


_PARTS: dict[str, dict[str, type[nn.Module]]] = {
    "linear": {"layernorm_feature": nn.LayerNorm, "linear_feature": nn.Linear},
    "conv": {"layernorm_feature": nn.LayerNorm, "conv_feature": nn.Conv2d},
    "identity": {},
}
_CONDITION = {"linear_condition": nn.Linear, "layernorm_condition": nn.LayerNorm}
"""The layers whose weights the operator reads, by form, and in every form."""


def parts(module: Any) -> dict[str, type[nn.Module]]:
    return {**_CONDITION, **_PARTS[FORMS[type(module).__name__]]}


def _refuse(module: Any) -> str | None:
    form = FORMS[type(module).__name__]
    names = ["projector_scale", "linear_feature", "layernorm_feature", *parts(module)]
    missing = lacks(module, *names, *(["spatial_merge_size"] if form == "identity" else []))
    if missing:
        return missing
    for name, kind in parts(module).items():
        part = getattr(module, name)
        if not isinstance(part, kind):
            return why_called(part, kind, name)
        if kind is nn.LayerNorm and part.eps != _EPS:
            return f"its {name} has eps {part.eps}; the operator's is {_EPS}"
        if part.weight is None or part.bias is None:
            return f"its {name} has no weight or no bias"
    if module.projector_scale != 1:
        return f"its projector_scale is {module.projector_scale}; the operator takes one control row per image, scale 1"
    try:
        # Offloaded weights have the right shapes and no device in common.
        _ = fold(module) if why_parts_called(module) is None else None
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def why_parts_called(module: Any, x: Tensor | None = None) -> str | None:
    """Return why a projector must call its layers, or None."""
    for name, kind in parts(module).items():
        part: Any = part_of(module, name)
        reason = why_part_called(part, kind, name, x)
        if reason is not None:
            return reason
        if part._parameters["bias"] is None or (kind is nn.LayerNorm and part.eps != _EPS):
            return f"its {name} has no weight, no bias or another eps than {_EPS}"
    if module.projector_scale != 1:
        return f"its projector_scale is {module.projector_scale}"
    return None if torch.compiler.is_compiling() else why_every_module_is_called()


def fold(module: Any) -> ControlProjector:
    """Return the projector's weights for `control_cross_attention`; only the convolution's weight is copied.

    Raises:
        ValueError: shapes that do not fit.
    """
    form = FORMS[type(module).__name__]

    def pair(part: Any) -> tuple[Tensor, Tensor]:
        return part.weight.detach(), part.bias.detach()

    condition_norm, condition = pair(module.layernorm_condition), pair(module.linear_condition)
    if form == "identity":
        return fold_projector(form, condition_norm=condition_norm, condition=condition)
    norm = pair(module.layernorm_feature)
    feature = pair(module.conv_feature if form == "conv" else module.linear_feature)
    return fold_projector(form, condition_norm=condition_norm, condition=condition, feature_norm=norm, feature=feature)


def project(module: Any, hidden_states: Tensor, conditions: Tensor | None, grid_thw: Tensor | None) -> Tensor:
    """Return projected tokens [tokens, H] of [images, tokens, D], [images, C, h, w] or, ragged by grid_thw, [tokens,
    H].

    Raises:
        ValueError: grid_thw is missing where it is needed; else as `control_cross_attention`, for instance conditions
            of other than one row per image, of which the published code would repeat a single one.
    """
    ends = None
    if FORMS[type(module).__name__] == "identity":
        if grid_thw is None:
            raise ValueError("grid_thw is None; it must be [images, 3], by which the tokens are those of images")
        lengths = grid_thw.prod(-1).cumsum(0) // module.spatial_merge_size**2
        ends = torch.cat([lengths.new_zeros(1), lengths]).to(hidden_states.device)
    if conditions is not None:
        conditions = conditions.contiguous()
    projector = folded(module, list(module.parameters()), lambda: fold(module))
    return control_cross_attention(hidden_states, conditions, projector, ends)


def _require_served(
    module: Any,
    hidden_states: Tensor,
    conditions: Tensor | None,
    output_intermediate: bool,
    grid_thw: Tensor | None,
) -> None:
    """Raise OwnForward for a call that the operator does not serve."""
    reason = None
    if torch.is_grad_enabled():
        reason = "gradients are enabled"
    elif torch.is_autocast_enabled(hidden_states.device.type):
        reason = "autocast"
    elif output_intermediate and conditions is not None:
        reason = "intermediate outputs are wanted"
    elif FORMS[type(module).__name__] == "identity":
        if conditions is None:
            reason = "without a condition there is nothing to compute"
        elif grid_thw is None:
            reason = "grid_thw is None; it must be [images, 3], by which the tokens are those of images"
    reason = reason or why_parts_called(module, hidden_states)
    if reason is not None:
        raise OwnForward(reason)


def _make(_: Forward) -> Serve:
    def serve(
        module: Any,
        calls: Counter[str] | None,
        hidden_states: Tensor,
        conditions: Tensor | None = None,
        output_intermediate: bool = False,
        grid_thw: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        _require_served(module, hidden_states, conditions, output_intermediate, grid_thw)
        try:
            projected = project(module, hidden_states, conditions, grid_thw)
        except (TypeError, ValueError) as error:
            # Nothing was computed yet: the module's own code takes more, or has an error of its own.
            raise OwnForward(str(error).partition(";")[0]) from error
        record(calls, "control_cross_attention")
        return projected, None

    return serve


RULES = (Rule("control_cross_attention", tuple(FORMS), _refuse, why_parts_called, _make),)
