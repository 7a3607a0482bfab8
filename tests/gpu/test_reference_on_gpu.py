"""The reference backend gives on a GPU what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from vpt_kernels import (
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

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def test_pixels_are_identical() -> None:
    image = torch.randint(0, 256, (333, 517, 3), dtype=torch.uint8)
    boxes = [(0, 0, 0, 517, 333), (0, 100, 20, 401, 300)]
    plan = plan_regions([(333, 517)], boxes, qwen2_vl_policy(longest_edge=256))
    assert torch.equal(roi_patches([image.cuda()], plan).cpu(), roi_patches([image], plan, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_agree(dtype: torch.dtype) -> None:
    image = torch.randint(0, 256, (200, 300, 3), dtype=torch.uint8)
    plan = plan_regions([(200, 300)], [(0, 0, 0, 300, 200)], qwen2_vl_policy())
    embed = fold_patch_weight(torch.randn(64, 3, 14, 14) / 24, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), dtype=dtype)
    on_gpu = type(embed)(embed.weight.cuda(), embed.bias.cuda(), embed.patch_size)
    expected = roi_patch_embed([image], plan, embed, backend="reference")
    found = roi_patch_embed([image.cuda()], plan, on_gpu)
    torch.testing.assert_close(found.cpu(), expected)


def test_projection_agrees() -> None:
    hidden = 96
    norm = (torch.rand(hidden), torch.randn(hidden))
    linear = (torch.randn(hidden, hidden) / 10, torch.randn(hidden))
    features, control = torch.randn(3, 17, hidden), torch.randn(3, hidden)
    on_cpu = fold_projector("identity", condition_norm=norm, condition=linear)
    expected = control_cross_attention(features, control, on_cpu)
    cuda = [tuple(t.cuda() for t in pair) for pair in (norm, linear)]
    projector = fold_projector("identity", condition_norm=cuda[0], condition=cuda[1])
    found = control_cross_attention(features.cuda(), control.cuda(), projector)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_append_agrees_and_clamps_positions() -> None:
    tokens, heads, dim = 7, 2, 128
    q, k, v = torch.randn(tokens, 4, dim), torch.randn(tokens, heads, dim), torch.randn(tokens, heads, dim)
    positions = torch.randint(0, 50, (3, tokens))
    slots = torch.tensor([3, -1, 0, 9, 16, 5, 1])
    table = rotary_table(50, dim)
    results = []
    for device in ("cpu", "cuda"):
        caches = [torch.zeros(16, heads, dim, device=device) for _ in range(2)]
        arguments = [t.to(device) for t in (q, k, v, table, positions, slots)]
        rotated = append_visual_kv(*arguments, *caches, backend="reference")
        results.append([rotated, *caches])
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found.cpu(), expected)
    far = torch.full_like(positions, 1000).cuda()
    moved = [t.cuda() for t in (q, k, v, table)]
    append_visual_kv(*moved, far, slots.cuda(), *results[1][1:], backend="reference")
