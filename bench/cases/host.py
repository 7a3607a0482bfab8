"""The smallest call of each operator: what Python, the dispatcher and planning cost before any work is done."""

from __future__ import annotations

from itertools import count

import torch

from bench.cases import Case
from bench.timers import Call
from vpt_kernels import (
    append_visual_kv_,
    control_cross_attention,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patches,
    rotary_table,
)

NAMES = ("plan_regions", "roi_patches", "control_cross_attention", "append_visual_kv_")
CALLS = 100


def _plan() -> Call:
    policy, fresh = qwen2_vl_policy(longest_edge=512), count()

    def call() -> object:
        i = next(fresh)
        return plan_regions([(3000, 4000)], [(0, i % 50, 10, 2000 + i % 70, 1500)], policy)

    return call


def _roi(device: str) -> Call:
    image = torch.zeros(28, 28, 3, dtype=torch.uint8, device=device)
    plan = plan_regions([(28, 28)], [(0, 0, 0, 28, 28)], qwen2_vl_policy(min_pixels=28 * 28))
    return lambda: roi_patches([image], plan)


def _control(device: str) -> Call:
    norm = (torch.ones(8, device=device), torch.zeros(8, device=device))
    projector = fold_projector("identity", condition_norm=norm, condition=(torch.eye(8, device=device), norm[1]))
    features, control = torch.ones(1, 8, device=device), torch.ones(1, 8, device=device)
    return lambda: control_cross_attention(features, control, projector)


def _append(device: str) -> Call:
    q, k, v = (torch.ones(1, heads, 128, device=device) for heads in (12, 2, 2))
    caches = [torch.zeros(16, 2, 128, device=device) for _ in range(2)]
    table, positions = rotary_table(16, 128, device=device), torch.zeros(3, 1, dtype=torch.int64, device=device)
    return lambda: append_visual_kv_(q, k, v, table, positions, positions[0], *caches)


SHAPES = {
    "plan_regions": "one region never seen",
    "roi_patches": "4 patches",
    "control_cross_attention": "1 token of 8",
    "append_visual_kv_": "1 token",
}


def build(name: str, device: str) -> Case:
    """A case without alternatives: `CALLS` calls, by the processor's clock, of which nobody waits for the device."""
    makers = {"roi_patches": _roi, "control_cross_attention": _control, "append_visual_kv_": _append}
    call = makers[name](device) if name in makers else _plan()

    def series() -> None:
        for _ in range(CALLS):
            call()

    return Case(name, f"host time, {SHAPES[name]}", "–", "cpu", [series], {}, call, None, calls=CALLS)
