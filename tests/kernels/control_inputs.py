"""Published projectors with random parameters, and their composition in plain PyTorch."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import linear, normal
from vpt_kernels import ControlProjector, fold_projector

Parameters = dict[str, tuple[Tensor, Tensor]]


def parameters(form: str, hidden: int, channels: int = 0, dtype: torch.dtype = torch.float32) -> Parameters:
    """Arguments of `fold_projector`; `channels` is the width of the features (identity: unused)."""
    return dict(_parameters(form, hidden, channels, dtype))


@cache
def _parameters(form: str, hidden: int, channels: int, dtype: torch.dtype) -> Parameters:

    def norm(size: int, name: str) -> tuple[Tensor, Tensor]:
        return 1 + normal(size, key=(name, "w"), dtype=dtype, scale=0.1), normal(
            size, key=(name, "b"), dtype=dtype, scale=0.1
        )

    found = {
        "condition_norm": norm(hidden, "condition"),
        "condition": (
            normal(hidden, hidden, key="condition", dtype=dtype, scale=hidden**-0.5),
            normal(hidden, key="condition", dtype=dtype, scale=0.1),
        ),
    }
    if form != "identity":
        shape = (hidden, channels, 4, 4) if form == "conv" else (hidden, channels)
        fan_in = channels * (16 if form == "conv" else 1)
        found["feature_norm"] = norm(channels, "feature")
        found["feature"] = (
            normal(*shape, key="feature", dtype=dtype, scale=fan_in**-0.5),
            normal(hidden, key="feature", dtype=dtype, scale=0.1),
        )
    return found


def fold(form: str, hidden: int, channels: int = 0, dtype: torch.dtype = torch.float32) -> ControlProjector:
    return fold_projector(form, **parameters(form, hidden, channels, dtype))


def composition(
    params: Parameters,
    features: Tensor,
    control: Tensor | None,
    cu_seqlens: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The published modules, every intermediate rounded to `dtype`; [tokens of all images, H]."""
    p = {name: tuple(t.to(dtype) for t in pair) for name, pair in params.items()}
    f = features.to(dtype)
    if "feature" in p and f.dim() == 4:
        f = F.layer_norm(f.permute(0, 2, 3, 1), p["feature_norm"][0].shape, *p["feature_norm"]).permute(0, 3, 1, 2)
        wide = torch.float32 if dtype == torch.float16 else dtype
        weight, bias = (t.to(wide) for t in p["feature"])
        f = F.conv2d(f.to(wide), weight, bias, stride=4).to(dtype).flatten(2).transpose(1, 2)
    elif "feature" in p:
        f = linear(F.layer_norm(f, f.shape[-1:], *p["feature_norm"]), *p["feature"])
    if f.dim() == 3:
        images = list(f)
    else:
        images = [f[a:b] for a, b in pairwise(cu_seqlens or [0, len(f)])]
    if control is not None:
        k = linear(F.layer_norm(control.to(dtype), control.shape[-1:], *p["condition_norm"]), *p["condition"])
        images = [f + torch.einsum("so,o->s", f, row)[:, None] * row for f, row in zip(images, k, strict=True)]
    return torch.cat(images) if images else f.reshape(0, f.shape[-1])
