"""The smallest call of each operator: what Python, the dispatcher and planning cost before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from bench.cases import Case, WrongResult, require_close
from bench.timers import Call
from bench.workloads import HostCall
from vpt_kernels import (
    RegionPlan,
    append_visual_kv_,
    control_cross_attention,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patches,
    rotary_table,
)

CALLS = 100
Made = tuple[Call, Callable[[], None]]
"""A call, and what raises WrongResult if its result is wrong."""


def _plan(device: str) -> Made:
    policy, fresh = qwen2_vl_policy(longest_edge=512), count()

    def call() -> RegionPlan:
        i = next(fresh)
        return plan_regions([(3000, 4000)], [(0, i % 50, 10, 2000 + i % 70, 1500)], policy)

    def check() -> None:
        # 2000 × 1490 pixels become 512 × 381 in the NEAREST step, and 504 × 392 in multiples of 28.
        if (grids := call().grids) != ((28, 36),):
            raise WrongResult(f"plan_regions: grids {grids} instead of ((28, 36),); a wrong row is not timed")

    return call, check


def _roi(device: str) -> Made:
    image = torch.full((28, 28, 3), 7, dtype=torch.uint8, device=device)
    plan = plan_regions([(28, 28)], [(0, 0, 0, 28, 28)], qwen2_vl_policy(min_pixels=28 * 28))

    def call() -> Tensor:
        return roi_patches([image], plan)

    return call, lambda: require_close("roi_patches", call().flatten(), image.flatten(), 0.0)


def _control(device: str) -> Made:
    ones = torch.ones(8, device=device)
    projector = fold_projector("identity", condition_norm=(ones, ones), condition=(torch.eye(8, device=device), ones))
    features, control = ones[None], ones[None]

    def call() -> Tensor:
        return control_cross_attention(features, control, projector)

    # Normalised ones are the bias, 1; the condition is 1 + 1; 1 + (8 · 1 · 2) · 2 = 33.
    return call, lambda: require_close("control_cross_attention", call(), 33 * features, 1e-6)


def _append(device: str) -> Made:
    q, k, v = (torch.ones(1, heads, 128, device=device) for heads in (12, 2, 2))
    caches = [torch.zeros(16, 2, 128, device=device) for _ in range(2)]
    table, positions = rotary_table(16, 128, device=device), torch.zeros(3, 1, dtype=torch.int64, device=device)

    def call() -> None:
        append_visual_kv_(q, k, v, table, positions, positions[0], *caches)

    def check() -> None:
        call()
        for name, found in (("q", q), ("k cache", caches[0][:1]), ("v cache", caches[1][:1])):
            require_close(f"append_visual_kv_: {name}", found, torch.ones_like(found), 0.0)

    return call, check


MAKERS = {
    "plan_regions": (_plan, "one region never seen"),
    "roi_patches": (_roi, "4 patches"),
    "control_cross_attention": (_control, "1 token of 8"),
    "append_visual_kv_": (_append, "1 token"),
}


def build(name: str, device: str) -> Case:
    """Return a case without alternatives: `CALLS` calls, by the processor's clock, of which nobody waits for the
    device.
    """
    make, shape = MAKERS[name]
    call, check = make(device)

    def series() -> None:
        for _ in range(CALLS):
            call()

    workload = HostCall(shape)
    return Case(name, workload.shape, workload.dtype, "cpu", [series], {}, check, None, calls=CALLS)
