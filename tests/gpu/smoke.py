"""Tiny calls of the operators on their backends, and of the attention: `python -m tests.gpu.smoke`.

They are few enough for compute-sanitizer. --backend, --operator: only these. On a machine without a GPU they run on the
CPU: "cpp", or "triton" in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys

import torch

from vpt_kernels import (
    append_visual_kv,
    append_visual_kv_,
    control_cross_attention,
    control_cross_attention_into,
    fold_patch_weight,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patches,
    rotary_table,
    sam_policy,
)
from vpt_kernels.backends import BackendUnavailable, reasons
from vpt_model.network.attention_triton import attend

DEVICE = "cpu" if os.environ.get("VPT_GPU_REHEARSAL") == "1" else "cuda"
# Triton's interpreter computes bfloat16 wrong.
DTYPES = (torch.float32,) if DEVICE == "cpu" else (torch.float32, torch.bfloat16, torch.float16)


def roi(backend: str, dtype: torch.dtype) -> None:
    images = [torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE) for size in ((37, 53, 3), (90, 31, 3))]
    sizes = [tuple(image.shape[:2]) for image in images]
    boxes = [(0, 0, 0, 53, 37), (1, 3, 5, 30, 88), (0, 7, 7, 8, 8)]
    sam = sam_policy(edge=32) if DEVICE == "cpu" else sam_policy()
    for policy in (qwen2_vl_policy(longest_edge=56), sam):
        patch = policy.patch_size
        conv = torch.randn(19, 3, patch, patch, device=DEVICE, dtype=dtype)
        few = policy is sam or DEVICE == "cpu"  # the interpreter takes seconds for a region
        plan = plan_regions(sizes, boxes[:1] if few else boxes, policy)
        roi_patches(images, plan, backend=backend)
        roi_patch_embed(images, plan, fold_patch_weight(conv, (0.5,) * 3, (0.25,) * 3), backend=backend)


def control(backend: str, dtype: torch.dtype) -> None:
    hidden, width = 48, 32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    norm, linear = (normal(hidden), normal(hidden)), (normal(hidden, hidden), normal(hidden))
    feature_norm = (normal(width), normal(width))
    forms = {
        "identity": ({}, normal(7, hidden)),
        "linear": (
            {"feature_norm": feature_norm, "feature": (normal(hidden, width), normal(hidden))},
            normal(7, width),
        ),
        "conv": (
            {"feature_norm": feature_norm, "feature": (normal(hidden, width, 4, 4), normal(hidden))},
            normal(1, width, 8, 4),
        ),
    }
    for form, (extra, features) in forms.items():
        projector = fold_projector(form, condition_norm=norm, condition=linear, **extra)
        out, tokens = normal(9, hidden), 2 if form == "conv" else 7
        rows = torch.tensor([5, -1, 2, 9, 0, 1, 8][:tokens], device=DEVICE)
        try:
            control_cross_attention(features, normal(1, hidden), projector, backend=backend)
            control_cross_attention_into(features, None, projector, out, rows, backend=backend)
        except BackendUnavailable as error:
            print(f"  {form}: {error}")


def append(backend: str, dtype: torch.dtype) -> None:
    tokens, table = 5, rotary_table(64, 16, device=DEVICE)
    positions = torch.randint(0, 64, (3, tokens), device=DEVICE)
    slots = torch.tensor([3, -1, 12, 0, 7], device=DEVICE)
    for layout, paged, quantised in itertools.product(("NHD", "HND"), (False, True), (False, True)):
        flat, pages = ((12, 2, 24), (3, 4, 2, 24)) if layout == "NHD" else ((2, 12, 24), (3, 2, 4, 24))
        shape = pages if paged else flat
        packed = torch.randn(tokens, 8 * 24 + 3, device=DEVICE, dtype=dtype)[:, 3:].unflatten(1, (8, 24))
        q, k, v = packed.split([4, 2, 2], dim=1)
        kind = torch.float8_e4m3fn if quantised else dtype
        caches = [torch.zeros(shape, device=DEVICE, dtype=dtype).to(kind) for _ in range(2)]
        scales = {name: torch.ones(2, device=DEVICE) for name in ("k_scale", "v_scale")} if quantised else {}
        arguments = (q, k, v, table, positions, slots, *caches, (2, 3, 3))
        try:
            append_visual_kv(*arguments, layout=layout, backend=backend, **scales)
            append_visual_kv_(*arguments, layout=layout, backend=backend, **scales)
        except BackendUnavailable as error:
            print(f"  {layout}: {error}")


def attention(dtype: torch.dtype) -> None:
    """One token and a chunk, rows of padding, more splits than one, keys up to the last slot."""
    keys, values = (torch.randn(2 * 150, 2, 24, device=DEVICE, dtype=dtype) for _ in range(2))
    for tokens, counts in ((1, [1, 0]), (20, [20, 7])):
        q = torch.randn(2, tokens, 6, 24, device=DEVICE, dtype=dtype)
        past = [150 - counts[0], 3]
        lengths = (torch.tensor(x, device=DEVICE, dtype=torch.int32) for x in ([150, 0], past, counts))
        attend(q, keys, values, *lengths, 150)


CALLS = {"roi_patch_embed": roi, "control_cross_attention": control, "append_visual_kv": append}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("all", "cuda", "triton", "cpp"), default="all")
    parser.add_argument("--operator", choices=(*CALLS, "attention"))
    options = parser.parse_args()
    backends = ("cuda", "triton") if options.backend == "all" else (options.backend,)
    for operator in CALLS if options.backend != "all" else ():
        why = reasons(operator, torch.device(DEVICE), torch.float32)[options.backend]
        if why and options.operator in (None, operator):
            sys.exit(f"{operator} cannot run on {options.backend}: {why}")
    for operator, call in CALLS.items():
        for backend in backends if options.operator in (None, operator) else ():
            for dtype in DTYPES:
                print(operator, backend, dtype, flush=True)
                try:
                    call(backend, dtype)
                except BackendUnavailable as error:
                    print(f"  {error}")
    if options.operator in (None, "attention") and "triton" in backends:
        for dtype in DTYPES:
            print("attention", dtype, flush=True)
            attention(dtype)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
