"""Errors of the operators and of same-dtype PyTorch, both against float64: `python -m bench.errors`.

Prints the tables of the operators' READMEs, whose numbers are in `bench/results/`: largest absolute error and root mean
square, ours and PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.roi import MEAN, STD
from vpt_kernels import (
    ControlProjector,
    append_visual_kv,
    control_cross_attention,
    fold_patch_weight,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patches,
    rotary_table,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def line(name: str, dtype: torch.dtype, ours: Tensor, eager: Tensor, oracle: Tensor) -> None:
    errors = [(t.double() - oracle).abs() for t in (ours, eager)]
    numbers = " | ".join(f"{e.max():.1e} / {e.square().mean().sqrt():.1e}" for e in errors)
    print(f"| {name} | {str(dtype).removeprefix('torch.')} | {numbers} | {oracle.abs().max():.1f} |")


def roi() -> None:
    images = {
        "noise": torch.randint(0, 256, (392, 504, 3), dtype=torch.uint8),
        "grey 119": torch.full((392, 504, 3), 119, dtype=torch.uint8),
        "white": torch.full((392, 504, 3), 255, dtype=torch.uint8),
    }
    weight = 0.02 * torch.randn(1280, 3, 2, 14, 14)
    plan = plan_regions([(392, 504)], [(0, 0, 0, 504, 392)], qwen2_vl_policy())
    for name, image in images.items():
        pixels = roi_patches([image], plan).view(-1, 14, 14, 3).permute(0, 3, 1, 2)
        for dtype in DTYPES:
            stored = weight.to(dtype)
            mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
            exact = ((pixels.double() / 255 - mean) / std).unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1)
            single = ((pixels.float() * (1 / 255) - mean.float()) / std.float()).unsqueeze(2)
            eager = F.linear(single.expand(-1, -1, 2, -1, -1).flatten(1).to(dtype), stored.flatten(1))
            ours = roi_patch_embed([image], plan, fold_patch_weight(stored, MEAN, STD))
            line(f"roi_patch_embed, {name}", dtype, ours, eager, exact @ stored.double().flatten(1).T)


def control() -> None:
    hidden, width = 1536, 1024
    for form in ("identity", "linear", "conv"):
        norm, linear = (
            (torch.rand(hidden), torch.randn(hidden)),
            (torch.randn(hidden, hidden) / 39, torch.randn(hidden)),
        )
        extra, features = {}, torch.randn(2, 256, hidden)
        if form == "linear":
            extra = {
                "feature_norm": (torch.rand(width), torch.randn(width)),
                "feature": (torch.randn(hidden, width) / 32, torch.randn(hidden)),
            }
            features = torch.randn(2, 256, width)
        if form == "conv":
            extra = {
                "feature_norm": (torch.rand(256), torch.randn(256)),
                "feature": (torch.randn(hidden, 256, 4, 4) / 64, torch.randn(hidden)),
            }
            features = torch.randn(2, 256, 64, 64)
        projector = fold_projector(form, condition_norm=norm, condition=linear, **extra)
        for dtype in DTYPES:
            stored = [None if t is None else t.to(dtype) for t in projector.tensors()]
            wide = [None if t is None else t.double() for t in stored]
            state = torch.randn(2, hidden).to(dtype)
            x = features.to(dtype)
            ours = control_cross_attention(x, state, ControlProjector(*stored))
            eager = control_cross_attention(x, state, ControlProjector(*stored), backend="reference")
            exact = control_cross_attention(x.double(), state.double(), ControlProjector(*wide), backend="reference")
            line(f"control_cross_attention, {form}", dtype, ours, eager, exact)


def append() -> None:
    tokens, heads, dim = 270, 12, 128
    table, positions, slots = rotary_table(4096, dim), torch.randint(0, 4096, (3, tokens)), torch.arange(tokens)
    for dtype in DTYPES:
        q, k, v = (torch.randn(tokens, n, dim).to(dtype) for n in (heads, 2, 2))
        ours = append_visual_kv(q, k, v, table, positions, slots, *(torch.zeros_like(k) for _ in range(2)))
        halves = (half.split([16, 24, 24], -1) for half in table[positions].chunk(2, -1))
        cos, sin = (torch.cat([p[i] for i, p in enumerate(parts)] * 2, -1)[:, None] for parts in halves)

        def rotate(x: Tensor, cos=cos, sin=sin) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)

        line("append_visual_kv, q", dtype, ours, rotate(q), rotate(q.double()))


def main() -> None:
    torch.manual_seed(0)
    print("| case | dtype | ours: largest / rms | PyTorch: largest / rms | largest value |\n|---|---|---|---|---|")
    with torch.inference_mode():
        roi()
        control()
        append()


if __name__ == "__main__":
    main()
