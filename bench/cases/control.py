"""control_cross_attention against the published composition, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    COMPILED,
    TOLERANCES,
    Alternative,
    Case,
    compiled,
    has_onednn,
    onednn,
    require_close,
    sweep,
    workspace,
)
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
    """Map features [images, tokens, D] ("conv": [images, C, h, w]) and control [images, H] to [images · tokens, H]."""
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


class Weights:
    """One projector: as the published composition takes it, and folded for ours."""

    def __init__(self, workload: Control, device: str) -> None:
        self.device, self.dtype = device, getattr(torch, workload.dtype)
        hidden, form, width = LMS[workload.lm].hidden, workload.form, WIDTHS[workload.form]
        norm = self.normal(hidden), self.normal(hidden)
        linear = self.normal(hidden, hidden, scale=hidden**0.5), self.normal(hidden)
        feature_norm = feature = None
        if form == "linear":
            feature_norm = self.normal(width), self.normal(width)
            feature = self.normal(hidden, width, scale=32), self.normal(hidden)
        elif form == "conv":
            feature_norm = self.normal(256), self.normal(256)
            feature = self.normal(hidden, 256, 4, 4, scale=64), self.normal(hidden)
        self.folded = fold_projector(
            form, condition_norm=norm, condition=linear, feature_norm=feature_norm, feature=feature
        )
        if form == "conv":
            # In the order of the blocks' numbers, made once: (y, x, channel).
            feature = (feature[0].permute(0, 2, 3, 1).flatten(1).contiguous(), feature[1])
        self.published = (form, feature_norm, feature, norm, linear)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) / scale).to(self.dtype)


class Problem:
    """One set of features and control rows under the weights that all sets of a row share."""

    def __init__(self, workload: Control, device: str, weights: Weights) -> None:
        self.workload, self.device, self.weights = workload, device, weights
        hidden, width = LMS[workload.lm].hidden, WIDTHS[workload.form]
        shape = (workload.images, workload.tokens, width or hidden)
        if workload.form == "conv":
            shape = (workload.images, 256, 64, workload.tokens // 4)
        self.features, self.control = weights.normal(*shape), weights.normal(workload.images, hidden)

    def ours(self) -> Tensor:
        return control_cross_attention(self.features, self.control, self.weights.folded)

    def published(self, composition: Callable[..., Tensor], *more: object) -> Callable[[], Tensor]:
        """Return a call of the published composition."""
        return lambda: composition(self.features, self.control, *self.weights.published, *more)

    def exact(self) -> Tensor:
        """Return the published composition in float64."""
        form, *pairs = self.weights.published
        wide = (pair and tuple(tensor.double() for tensor in pair) for pair in pairs)
        return eager(self.features.double(), self.control.double(), form, *wide)


EAGER = Alternative(
    "eager",
    "the published composition: layer_norm, linear (no convolution: a product over blocks), einsum, residual",
    lambda problem: problem.published(eager),
)
ALTERNATIVES = (
    EAGER,
    Alternative("torch.compile", COMPILED, lambda problem: problem.published(compiled(eager))),
    Alternative(
        "eager + oneDNN",
        "the same with mkldnn._linear_pointwise instead of MKL's product",
        lambda problem: problem.published(eager, onednn),
        lambda problem: "has no large product" if problem.workload.form == "identity" else has_onednn(problem),
    ),
)


def build(workload: Control, device: str) -> Case:
    torch.manual_seed(0)
    weights, work = Weights(workload, device), control_work(workload, WIDTHS[workload.form])
    count = 1 if device == "cpu" else min(16, 1 + (128 << 20) // work.bytes)
    problems = [Problem(workload, device, weights) for _ in range(count)]
    ours = [problem.ours for problem in problems]
    alternatives = {one.name: one.calls(problems) for one in ALTERNATIVES}

    def check() -> None:
        exact = problems[0].exact()
        for name, calls in {"ours": ours, **alternatives}.items():
            if not isinstance(calls, str):
                what = f"control_cross_attention {workload.form}: {name}"
                require_close(what, calls[0](), exact, TOLERANCES[workload.dtype])

    return Case(
        "control_cross_attention",
        workload.shape,
        workload.dtype,
        device,
        ours,
        alternatives,
        check,
        work,
        workspace(
            ours[0], device, workload.images * workload.tokens * LMS[workload.lm].hidden * weights.dtype.itemsize
        ),
        sweep=sweep("control_cross_attention", workload),
    )
