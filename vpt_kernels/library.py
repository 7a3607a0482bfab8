"""The operators' schemas and fake implementations: the one place where ops are defined.

Every operator has one overload per backend (`vpt_kernels::roi_patches.cpp`, `….reference`), all with the same
schema and the same fake, so that a compiled graph names the implementation it was built with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import or_
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpp", "reference")
"""Every operator has an overload for each; `vpt_kernels.backends` says which exist and which is tried first."""

CONV_KERNEL = 4
"""Side and stride of the patches that the conv form of `control_cross_attention` makes into tokens."""

_CONTROL = (
    "Tensor features, Tensor? control, Tensor? cu_seqlens, Tensor? feature_norm_weight, Tensor? feature_norm_bias, "
    "Tensor? feature_weight, Tensor? feature_bias, Tensor condition_norm_weight, Tensor condition_norm_bias, "
    "Tensor condition_weight, Tensor condition_bias, Tensor? score_weight, Tensor? score_bias"
)
_APPEND = (
    "Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "int section_t, int section_h, int section_w, bool interleaved, bool heads_first, Tensor? k_scale, "
    "Tensor? v_scale, Tensor? q_norm, Tensor? k_norm, float norm_eps"
)
_PACKED = (
    "Tensor x, Tensor data, Tensor? scales, Tensor? minima, SymInt features, bool gated, bool dynamic, "
    "Tensor? bias, Tensor? residual, int activation"
)
SCHEMAS = {
    "roi_patches": "(Tensor[] images, Tensor plan, SymInt rows, SymInt row_bytes) -> Tensor",
    "roi_patch_embed": "(Tensor[] images, Tensor plan, SymInt rows, Tensor weight, Tensor bias) -> Tensor",
    "roi_patch_embed_into": (
        "(Tensor[] images, Tensor plan, Tensor weight, Tensor bias, Tensor(a!) out, SymInt row) -> ()"
    ),
    "control_cross_attention": f"({_CONTROL}) -> Tensor",
    "control_cross_attention_into": f"({_CONTROL}, Tensor(a!) out, Tensor rows) -> ()",
    "append_visual_kv": f"(Tensor q, {_APPEND}) -> Tensor",
    "append_visual_kv_": f"(Tensor(c!) q, {_APPEND}) -> ()",
    "cached_attention": "(Tensor q, Tensor keys, Tensor values, bool causal) -> (Tensor, Tensor)",
    "packed_linear": f"({_PACKED}) -> Tensor",
    "packed_linear_into": f"({_PACKED}, Tensor(a!) out) -> ()",
}


def _roi_patches(images: Sequence[Tensor], plan: Tensor, rows: int, row_bytes: int) -> Tensor:
    device = images[0].device if images else plan.device
    return torch.empty((rows, row_bytes), dtype=torch.uint8, device=device)


def _roi_patch_embed(images: Sequence[Tensor], plan: Tensor, rows: int, weight: Tensor, bias: Tensor) -> Tensor:
    return weight.new_empty((rows, weight.shape[0]))


def _control_cross_attention(
    features: Tensor,
    control: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_norm_weight: Tensor | None,
    feature_norm_bias: Tensor | None,
    feature_weight: Tensor | None,
    *condition: Tensor | None,
) -> Tensor:
    if feature_weight is None:
        return features.new_empty((features[..., 0].numel(), features.shape[-1]))
    if features.dim() == 4:
        tokens = features.shape[0] * (features.shape[2] // CONV_KERNEL) * (features.shape[3] // CONV_KERNEL)
    else:
        tokens = features[..., 0].numel()
    return features.new_empty((tokens, feature_weight.shape[0]))


def _append_visual_kv(q: Tensor, *others: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _cached_attention(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _packed_linear(
    x: Tensor, data: Tensor, scales: Tensor | None, minima: Tensor | None, features: int, *others: object
) -> Tensor:
    return x.new_empty((x.shape[0], features))


def _mutates(*others: object) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "roi_patches": _roi_patches,
    "roi_patch_embed": _roi_patch_embed,
    "roi_patch_embed_into": _mutates,
    "control_cross_attention": _control_cross_attention,
    "control_cross_attention_into": _mutates,
    "append_visual_kv": _append_visual_kv,
    "append_visual_kv_": _mutates,
    "cached_attention": _cached_attention,
    "packed_linear": _packed_linear,
    "packed_linear_into": _mutates,
}

_LIBRARY = torch.library.Library("vpt_kernels", "DEF")
_AUTOCASTS = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST = functools.reduce(or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, k)) for k in _AUTOCASTS))
OPS: dict[str, dict[str, torch._ops.OpOverload]] = {}
"""`OPS[operator][backend]` is the bound overload."""


def _as_given(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """Let an operator compute in the dtypes of its arguments; autocast would reach what PyTorch computes inside it."""

    def kernel(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return overload(*arguments)

    return kernel


def _written_as_they_lie(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """Refuse to write through a view that stands for the negative of its memory; PyTorch's own way ends in an error of
    its inside where an operator returns nothing.
    """
    written = [a.name if a.alias_info is not None and a.alias_info.is_write else "" for a in overload._schema.arguments]

    def kernel(*arguments: Any) -> Any:
        for name, argument in zip(written, arguments):
            if name and argument.is_neg():
                raise ValueError(f"{name} is a negated view, say the imaginary part of a conjugate; pass a clone")
        return overload(*map(_resolved, arguments))

    return kernel


def _resolved(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_resolved(one) for one in argument]
    return argument.resolve_neg() if isinstance(argument, Tensor) else argument


for _name, _schema in SCHEMAS.items():
    OPS[_name] = {}
    for _backend in BACKENDS:
        _LIBRARY.define(f"{_name}.{_backend}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"vpt_kernels::{_name}.{_backend}", _FAKES[_name], lib=_LIBRARY)
        OPS[_name][_backend] = getattr(getattr(torch.ops.vpt_kernels, _name), _backend)
        for _key in _AUTOCASTS:
            _LIBRARY.impl(f"{_name}.{_backend}", _as_given(OPS[_name][_backend]), _key)
        if "!" in _schema:
            _LIBRARY.impl(f"{_name}.{_backend}", _written_as_they_lie(OPS[_name][_backend]), "Negative")


def implement(name: str, backend: str, function: Callable[..., Any]) -> None:
    """Register a Python implementation of `name` for `backend`, on every device."""
    _LIBRARY.impl(f"{name}.{backend}", function, "CompositeExplicitAutograd")
