"""The float32 product in bytes: rows with outliers keep their small weights, NaN and infinity are not lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vpt_kernels import fold_patch_weight, plan_regions, qwen2_vl_policy, roi_patch_embed

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
IMAGE = torch.randint(0, 256, (112, 168, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
PLAN = plan_regions([(112, 168)], [(0, 0, 0, 168, 112)], qwen2_vl_policy())


def tokens(weight: torch.Tensor, backend: str) -> torch.Tensor:
    return roi_patch_embed([IMAGE], PLAN, fold_patch_weight(weight, MEAN, STD), backend=backend)


@pytest.mark.parametrize("largest", [1.0, 20.0, 300.0])
def test_outliers(largest: float) -> None:
    weight = torch.randn(48, 3, 14, 14, generator=torch.Generator().manual_seed(4)) / 24
    weight[::2, 1, 5, 5] = largest
    ours, eager, exact = tokens(weight, "cpp"), tokens(weight, "reference"), tokens(weight.double(), "reference")
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        errors = [(t[:, rows].double() - exact[:, rows]).square().mean().sqrt() for t in (ours, eager)]
        assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_a_number_spreads_over_its_own_output_only(value: float, dtype: torch.dtype) -> None:
    weight = (torch.randn(6, 3, 14, 14) / 24).to(dtype)
    weight[2, 0, 3, 3] = value
    folded = fold_patch_weight(weight, MEAN, STD)
    # Folding spreads it over the bias too; the product must not rely on that.
    for embed in (folded, replace(folded, bias=torch.zeros_like(folded.bias))):
        result = roi_patch_embed([IMAGE], PLAN, embed, backend="cpp")
        assert not result[:, 2].isfinite().any()
        assert result[:, [0, 1, 3, 4, 5]].isfinite().all()


def test_zero_weights() -> None:
    embed = fold_patch_weight(torch.zeros(4, 3, 14, 14), MEAN, STD, torch.arange(4.0))
    assert torch.equal(roi_patch_embed([IMAGE], PLAN, embed), torch.arange(4.0).expand(PLAN.rows, 4))
