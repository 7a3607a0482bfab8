"""The control-conditioned projector of the re-encoder: rank one, one key, no softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vpt_kernels.backends import CAPABILITIES, bind, call
from vpt_kernels.checks import (
    CHECK_VALUES,
    require_choice,
    require_disjoint,
    require_inference,
    require_segments,
    require_slots,
    require_tensor,
    require_type,
    shown,
)
from vpt_kernels.library import CONV_KERNEL

FORMS = ("linear", "conv", "identity")


@dataclass(frozen=True)
class ControlProjector:
    """A conditioned projector's weights in the layout the kernels read; made by `fold_projector`.

    The feature tensors are None in the "identity" form. `feature_weight` W is [H, D] ("linear") or [H, 16·C]
    ("conv", columns in (ky, kx, c) order; D = 16·C below). With the feature bias b and the condition's W_c and b_c,
    `score_weight` is [WᵀW_c; bᵀW_c], float32 [D + 1, H], and `score_bias` [Wᵀb_c; b·b_c], float32 [D + 1]: from
    n = LayerNorm(control) they give a token's score, see README.md. None where no backend reads them.
    """

    feature_norm_weight: Tensor | None
    feature_norm_bias: Tensor | None
    feature_weight: Tensor | None
    feature_bias: Tensor | None
    condition_norm_weight: Tensor
    condition_norm_bias: Tensor
    condition_weight: Tensor
    condition_bias: Tensor
    score_weight: Tensor | None = None
    score_bias: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        return self.condition_weight.shape[0]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.feature_norm_weight,
            self.feature_norm_bias,
            self.feature_weight,
            self.feature_bias,
            self.condition_norm_weight,
            self.condition_norm_bias,
            self.condition_weight,
            self.condition_bias,
            self.score_weight,
            self.score_bias,
        )


_PARTS = tuple(ControlProjector.__dataclass_fields__)
"""Names of what `ControlProjector.tensors` returns."""


def fold_projector(
    form: str,
    *,
    condition_norm: tuple[Tensor, Tensor],
    condition: tuple[Tensor, Tensor],
    feature_norm: tuple[Tensor, Tensor] | None = None,
    feature: tuple[Tensor, Tensor] | None = None,
    score: bool | None = None,
) -> ControlProjector:
    """Arrange a published projector's parameters for `control_cross_attention`.

    Args:
        form: "linear" (`MinimalProjector`, DINOv2), "conv" (`MinimalSamProjector`, SAM: 4×4 convolution of stride 4)
            or "identity" (`MinimalCLIPProjector`: features pass unchanged).
        condition_norm, condition: (weight, bias) of `layernorm_condition` [H] and `linear_condition` [H, H].
        feature_norm, feature: (weight, bias) of `layernorm_feature` and of `linear_feature` [H, D] or
            `conv_feature` [H, C, 4, 4]; required unless form is "identity", which must not have them.
        score: also fold the maps from LayerNorm(control) to a token's score, which the Triton backend of "linear" and
            "conv" reads: 4·(D + 1)·(H + 1) bytes, computed in float64. None: where Triton runs, that is for parameters
            on a GPU. Say True for parameters that are moved to one later.

    Raises:
        ValueError: unknown form, missing or superfluous parameters, shapes or dtypes that do not fit.
    """
    require_choice("form", form, FORMS)
    require_type("score", score, (bool, type(None)), "True, False or None")
    if (form == "identity") != (feature_norm is None) or (form == "identity") != (feature is None):
        raise ValueError(f"form {form!r} {'takes no' if form == 'identity' else 'needs'} feature_norm and feature")
    _require_pair("condition_norm", condition_norm, 1)
    _require_pair("condition", condition, 2)
    hidden = condition[0].shape[0]
    _require_shape("condition weight", condition[0], (hidden, hidden))
    expected = [("condition bias", condition[1], (hidden,))]
    expected += [(f"condition_norm {n}", t, (hidden,)) for n, t in zip(("weight", "bias"), condition_norm)]
    folded = None
    if feature is not None and feature_norm is not None:
        _require_pair("feature_norm", feature_norm, 1)
        _require_pair("feature", feature, None)
        weight = feature[0]
        channels = feature_norm[0].shape[0]
        if form == "conv":
            _require_shape("feature weight", weight, (hidden, channels, CONV_KERNEL, CONV_KERNEL))
            folded = weight.permute(0, 2, 3, 1).reshape(hidden, -1).contiguous()
        else:
            _require_shape("feature weight", weight, (hidden, channels))
            folded = weight.contiguous()
        expected.append(("feature bias", feature[1], (hidden,)))
        expected.append(("feature_norm bias", feature_norm[1], (channels,)))
    for name, tensor, shape in expected:
        _require_shape(name, tensor, shape)
    projector = ControlProjector(
        feature_norm_weight=feature_norm[0].contiguous() if feature_norm else None,
        feature_norm_bias=feature_norm[1].contiguous() if feature_norm else None,
        feature_weight=folded,
        feature_bias=feature[1].contiguous() if feature else None,
        condition_norm_weight=condition_norm[0].contiguous(),
        condition_norm_bias=condition_norm[1].contiguous(),
        condition_weight=condition[0].contiguous(),
        condition_bias=condition[1].contiguous(),
    )
    return scored(projector, score)


def scored(projector: ControlProjector, score: bool | None = None) -> ControlProjector:
    """Return the projector with its score maps folded anew from its weights, or without them; `score` as in
    `fold_projector`.

    For weights that were changed after folding. Computed in float64, rounded once to float32.

    Raises:
        ValueError: the weights have several dtypes or devices.
    """
    *weights, _, _ = projector.tensors()
    kinds = {(t.dtype, t.device) for t in weights if t is not None}
    if len(kinds) != 1:
        raise ValueError(f"the projector's tensors have several dtypes or devices {kinds}; convert them to one")
    weight = projector.condition_weight
    if score is None:
        devices = CAPABILITIES["control_cross_attention"]["triton"].devices
        score = devices is None or weight.device.type in devices
    if not score or projector.feature_weight is None:
        return replace(projector, score_weight=None, score_bias=None)
    names = ("feature_weight", "feature_bias", "condition_weight", "condition_bias")
    weight, bias, condition, condition_bias = (getattr(projector, name).detach().double() for name in names)
    rows = torch.cat([weight.T, bias[None]])
    return replace(projector, score_weight=(rows @ condition).float(), score_bias=(rows @ condition_bias).float())


def _require_pair(name: str, pair: tuple[Tensor, Tensor], rank: int | None) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} is {shown(pair)}; it must be two tensors (weight, bias)")
    for part, tensor, dim in zip(("weight", "bias"), pair, (rank, 1)):
        require_tensor(f"{name} {part}", tensor, None, None, dim)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} {part} is {tensor.dtype}; it must be floating point")


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")


def _check(features: Tensor, control: Tensor | None, projector: ControlProjector, cu_seqlens: Tensor | None) -> int:
    """Validate a call; return the number of tokens it projects."""
    require_type("projector", projector, ControlProjector, "what fold_projector returns")
    require_type("control", control, (Tensor, type(None)), "a torch.Tensor or None")
    dtype, device = projector.condition_weight.dtype, projector.condition_weight.device
    weight, hidden = projector.feature_weight, projector.hidden_size
    require_tensor("features", features, dtype, device, None)
    require_inference(features=features, control=control)
    for tensor in projector.tensors():
        require_inference(projector=tensor)
    norm = projector.feature_norm_weight
    channels = hidden if norm is None else norm.shape[0]
    is_conv = weight is not None and weight.shape[1] != channels
    if is_conv:
        if features.dim() != 4 or features.shape[1] != channels or any(n % CONV_KERNEL for n in features.shape[2:]):
            raise ValueError(
                f"features have shape {tuple(features.shape)}; the conv form needs [images, {channels}, h, w], h and "
                f"w multiples of {CONV_KERNEL}"
            )
        tokens = features.shape[0] * (features.shape[2] // CONV_KERNEL) * (features.shape[3] // CONV_KERNEL)
    else:
        if features.dim() not in (2, 3) or features.shape[-1] != channels:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; this form needs [tokens, {channels}] or "
                f"[images, tokens, {channels}]"
            )
        if features.stride(-1) != 1 and features.shape[-1] > 1:
            raise ValueError(f"features have strides {features.stride()}; the last dimension must be contiguous")
        tokens = features.shape[0] * (features.shape[1] if features.dim() == 3 else 1)
    batched = features.dim() > 2
    if cu_seqlens is not None:
        if batched:
            raise ValueError(f"cu_seqlens goes with [tokens, D] features; these are {tuple(features.shape)}")
        require_tensor("cu_seqlens", cu_seqlens, None, device, 1)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}; it must be int32 or int64")
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens is empty; it must hold 0 and the end of each image's tokens")
        if cu_seqlens.shape[0] == 1 and tokens:
            raise ValueError(f"cu_seqlens names no image, but there are {tokens} tokens; add the end of each image's")
        if (cu_seqlens.device.type == "cpu" or CHECK_VALUES) and not torch.compiler.is_compiling():
            require_segments(cu_seqlens, tokens)
    images = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else features.shape[0] if batched else 1
    if control is not None:
        require_tensor("control", control, dtype, device, 2)
        if tuple(control.shape) != (images, hidden):
            raise ValueError(
                f"control has shape {tuple(control.shape)}; {images} image(s) need exactly one control row each, "
                f"({images}, {hidden}): nothing is broadcast"
            )
        if control.stride(1) != 1 and hidden > 1:
            raise ValueError(f"control has strides {control.stride()}; the last dimension must be contiguous")
    return tokens


_IN_CUDA = {"cuda": "it has the identity form only, without the library's GEMM: linear and conv run on triton"}
_IN_TRITON = {"triton": "the projector was folded without its score maps: fold_projector(…, score=True)"}
_NEITHER = {**_IN_CUDA, **_IN_TRITON}
_NOTHING: dict[str, str] = {}
_WIDEST_ROW = 16384


def _declined(projector: ControlProjector, control: Tensor | None) -> dict[str, str]:
    """Return the backends that cannot run this form, and why."""
    if projector.feature_weight is None:
        if projector.hidden_size <= _WIDEST_ROW:
            return _NOTHING
        return {"triton": f"rows of {projector.hidden_size} exceed the {_WIDEST_ROW} it keeps in registers"}
    return _NEITHER if projector.score_weight is None and control is not None else _IN_CUDA


def control_cross_attention(
    features: Tensor,
    control: Tensor | None,
    projector: ControlProjector,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Apply rank-one, one-key cross-attention without softmax: out = f + (f·k)k, k = Linear(LayerNorm(control)).

    f is Linear(LayerNorm(features)) ("linear"), a 4×4 convolution of the channel-normalised features ("conv") or the
    features themselves ("identity"). LayerNorm's eps is 1e-5.

    Args:
        features: [tokens, D] or [images, tokens, D], last dimension contiguous; conv: [images, C, h, w], any strides.
        control: one row per image, [images, H], the language model's hidden state at the action token; None for the
            unconditioned projection out = f.
        projector: from `fold_projector`.
        cu_seqlens: int32 or int64 [images + 1], where each image's tokens begin and end in [tokens, D] features;
            None means one image.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        [tokens of all images, H] in the features' dtype, always a new tensor. On `cpp` the score and
        the rank-one term are float32 and the sum is rounded once.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shapes or device, misordered cu_seqlens, control rows ≠ images.
        BackendUnavailable: an explicit backend cannot run here.

    Source: `MinimalProjector`, `MinimalSamProjector`, `MinimalCLIPProjector` of arXiv 2502.17425's code.
    """
    _check(features, control, projector, cu_seqlens)
    op = bind(
        "control_cross_attention",
        "control_cross_attention",
        backend,
        features.device,
        features.dtype,
        _declined(projector, control),
    )
    return call(op, features, control, cu_seqlens, *projector.tensors())


def control_cross_attention_into(
    features: Tensor,
    control: Tensor | None,
    projector: ControlProjector,
    out: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Do what `control_cross_attention` does, but write token i to `out[rows[i]]`; other rows are left alone.

    Args:
        out: [L, H], dtype and device of the features, last dimension contiguous (an embedding buffer); it must not
            share memory with an input or the projector's weights.
        rows: int32 or int64 [tokens]; a row < 0 or ≥ L is skipped. Equal rows: one of the tokens wins.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `control_cross_attention`; `out` is untouched after an error.
    """
    tokens = _check(features, control, projector, cu_seqlens)
    require_tensor("out", out, features.dtype, features.device, 2)
    require_tensor("rows", rows, None, features.device, 1)
    require_inference(out=out)
    if out.shape[1] != projector.hidden_size or out.stride(1) != 1:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}; it needs {projector.hidden_size} contiguous "
            "columns"
        )
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows is {rows.dtype}; it must be int32 or int64")
    if rows.shape[0] != tokens:
        raise ValueError(f"rows has {rows.shape[0]} entries; the features give {tokens} tokens")
    given = {"features": features, "control": control, "cu_seqlens": cu_seqlens, "rows": rows}
    require_disjoint({"out": out}, given | dict(zip(_PARTS, projector.tensors())))
    if CHECK_VALUES and not torch.compiler.is_compiling():
        require_slots("rows", rows, out.shape[0])
    op = bind(
        "control_cross_attention",
        "control_cross_attention_into",
        backend,
        features.device,
        features.dtype,
        _declined(projector, control),
    )
    call(op, features, control, cu_seqlens, *projector.tensors(), out, rows)
