"""control_cross_attention against the published composition, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import TOLERANCES, Case, onednn, require_close, sweep, workspace
from bench.rooflines import control_work
from bench.workloads import LMS, Control
from vpt_kernels import control_cross_attention, fold_projector

WIDTHS = {"identity": 0, "linear": 1024, "conv": 256 * 16}
"""K of the feature product: DINOv2's 1024 channels; SAM's 4×4 blocks of 256."""
EPS = 1e-5


def eager(
    features: Tensor,
    control: Tensor,
    form: str,
    feature_norm: tuple[Tensor, Tensor] | None,
    feature: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor, Tensor],
    linear: tuple[Tensor, Tensor],
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """[images, tokens, D] features ("conv": [images, C, h, w]) and [images, H] control → [images · tokens, H]."""
    f = features
    if form == "conv":
        channels = f.permute(0, 2, 3, 1)
        normal = F.layer_norm(channels, channels.shape[-1:], *feature_norm, EPS)
        # A GEMM over 4×4 blocks: a convolution whose stride is its kernel would be far slower.
        images, height, width, depth = normal.shape
        blocks = normal.reshape(images, height // 4, 4, width // 4, 4, depth).permute(0, 1, 3, 2, 4, 5)
        f = product(blocks.reshape(images, -1, 16 * depth), feature[0], feature[1])
    elif form == "linear":
        f = product(F.layer_norm(f, f.shape[-1:], *feature_norm, EPS), *feature)
    k = F.linear(F.layer_norm(control, control.shape[-1:], *norm, EPS), *linear)
    return (f + torch.einsum("bso,bo->bs", f, k)[..., None] * k[:, None]).flatten(0, 1)


def build(workload: Control, device: str) -> Case:
    torch.manual_seed(0)
    hidden, form, dtype = LMS[workload.lm].hidden, workload.form, getattr(torch, workload.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) / scale).to(dtype)

    norm, linear = (normal(hidden), normal(hidden)), (normal(hidden, hidden, scale=hidden**0.5), normal(hidden))
    feature_norm = feature = None
    width = WIDTHS[form]
    if form == "linear":
        feature_norm, feature = (normal(width), normal(width)), (normal(hidden, width, scale=32), normal(hidden))
    elif form == "conv":
        feature_norm, feature = (normal(256), normal(256)), (normal(hidden, 256, 4, 4, scale=64), normal(hidden))
    projector = fold_projector(form, condition_norm=norm, condition=linear, feature_norm=feature_norm, feature=feature)
    shape = (workload.images, workload.tokens, width or hidden)
    if form == "conv":
        shape = (workload.images, 256, 64, workload.tokens // 4)
    work = control_work(workload, width)
    count = 1 if device == "cpu" else min(16, 1 + (128 << 20) // work.bytes)
    inputs = [(normal(*shape), normal(workload.images, hidden)) for _ in range(count)]
    compiled = torch.compile(eager, fullgraph=True)
    if form == "conv":
        # In the order of the blocks' numbers, made once: (y, x, channel).
        feature = (feature[0].permute(0, 2, 3, 1).flatten(1).contiguous(), feature[1])
    weights = (form, feature_norm, feature, norm, linear)

    def calls(function, *more):
        return [lambda f=f, c=c: function(f, c, *weights, *more) for f, c in inputs]

    ours = [lambda f=f, c=c: control_cross_attention(f, c, projector) for f, c in inputs]
    alternatives = {"eager": calls(eager), "torch.compile": calls(compiled)}
    if device == "cpu" and workload.dtype == "float32" and feature and torch.backends.mkldnn.is_available():
        # F.linear takes MKL for float32; oneDNN is faster on some processors, and less exact.
        alternatives["eager + oneDNN"] = calls(eager, onednn)

    def check() -> None:
        wide = eager(*(t.double() for t in inputs[0]), form, *(p and tuple(t.double() for t in p) for p in weights[1:]))
        for name, same in {"ours": ours, **alternatives}.items():
            require_close(f"control_cross_attention {form}: {name}", same[0](), wide, TOLERANCES[workload.dtype])

    outputs = workload.images * workload.tokens * hidden * dtype.itemsize
    return Case(
        "control_cross_attention",
        workload.shape,
        workload.dtype,
        device,
        ours,
        alternatives,
        check,
        work,
        workspace(ours[0], device, outputs),
        sweep=sweep("control_cross_attention", workload),
    )
