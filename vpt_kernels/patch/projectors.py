"""The published re-encoder's projectors through `control_cross_attention`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from vpt_kernels.control_cross_attention.api import ControlProjector, control_cross_attention, fold_projector
from vpt_kernels.patch.rules import Forward, Rule, folded, hooked, lacks

FORMS = {"MinimalProjector": "linear", "MinimalSamProjector": "conv", "MinimalCLIPProjector": "identity"}
_EPS = 1e-5


def _refuse_parts(module: nn.Module) -> str | None:
    missing = lacks(
        module, "projector_scale", "linear_feature", "linear_condition", "layernorm_feature", "layernorm_condition"
    )
    if missing:
        return missing
    if module.projector_scale != 1:
        return f"its projector_scale is {module.projector_scale}; the operator takes one control row per image, scale 1"
    parts = {"linear_condition": nn.Linear, "layernorm_condition": nn.LayerNorm}
    form = FORMS[type(module).__name__]
    if form != "identity":
        parts |= {"layernorm_feature": nn.LayerNorm, "linear_feature": nn.Linear}
    if form == "conv":
        if not hasattr(module, "conv_feature"):
            return "it has no attribute conv_feature"
        parts["conv_feature"] = nn.Conv2d
    elif form == "identity" and not hasattr(module, "spatial_merge_size"):
        return "it has no attribute spatial_merge_size"
    for name, kind in parts.items():
        part = getattr(module, name)
        if type(part) is not kind:
            return f"its {name} is a {type(part).__name__}, not a plain {kind.__name__}"
        if hooked(part):
            return f"its {name} has hooks, which the operator would skip"
        if kind is nn.LayerNorm and part.eps != _EPS:
            return f"its {name} has eps {part.eps}; the operator's is {_EPS}"
        if part.weight is None or part.bias is None:
            return f"its {name} has no weight or no bias"
    return None


def _refuse(module: nn.Module) -> str | None:
    reason = _refuse_parts(module)
    if reason is None:
        try:
            fold(module)
        except ValueError as error:
            reason = str(error)
    return reason


def fold(module: nn.Module) -> ControlProjector:
    """The projector's weights for `control_cross_attention`; nothing is copied but the convolution's weight.

    Raises:
        ValueError: shapes that do not fit.
    """
    form = FORMS[type(module).__name__]

    def pair(part: nn.Module) -> tuple[Tensor, Tensor]:
        return part.weight.detach(), part.bias.detach()

    feature = {}
    if form != "identity":
        source = module.conv_feature if form == "conv" else module.linear_feature
        feature = {"feature_norm": pair(module.layernorm_feature), "feature": pair(source)}
    return fold_projector(
        form, condition_norm=pair(module.layernorm_condition), condition=pair(module.linear_condition), **feature
    )


def project(module: nn.Module, hidden_states: Tensor, conditions: Tensor | None, grid_thw: Tensor | None) -> Tensor:
    """Projected tokens [tokens, H] of [images, tokens, D], [images, C, h, w] or, ragged by grid_thw, [tokens, H].

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


def _reason(
    module: nn.Module,
    hidden_states: Tensor,
    conditions: Tensor | None,
    output_intermediate: bool,
    grid_thw: Tensor | None,
) -> str | None:
    """Why this call takes the module's own forward, or None."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled(hidden_states.device.type):
        return "autocast"
    if output_intermediate and conditions is not None:
        return "intermediate outputs are wanted"
    if FORMS[type(module).__name__] == "identity":
        if conditions is None:
            return "without a condition there is nothing to compute"
        if grid_thw is None:
            return "grid_thw is missing"
    return _refuse_parts(module)


def _make(original: Forward, calls: Counter[str]) -> Forward:
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        conditions: Tensor | None = None,
        output_intermediate: bool = False,
        grid_thw: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        reason = _reason(self, hidden_states, conditions, output_intermediate, grid_thw)
        if reason is None:
            try:
                projected = project(self, hidden_states, conditions, grid_thw)
            except (TypeError, ValueError) as error:
                # Nothing was computed yet: the module's own code takes more, or has an error of its own.
                reason = str(error).partition(";")[0]
            else:
                calls["control_cross_attention"] += 1
                return projected, None
        calls[f"original: {reason}"] += 1
        grid = {"grid_thw": grid_thw} if FORMS[type(self).__name__] == "identity" else {}
        return original(self, hidden_states, conditions, output_intermediate, **grid)

    return forward


RULES = (Rule("control_cross_attention", tuple(FORMS), _refuse, _make),)
