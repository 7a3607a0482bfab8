from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.model.inputs import random_image, tiny_model, tiny_state
from vpt_kernels import qwen2_vl_policy
from vpt_model.engine import perception
from vpt_model.engine.events import Clock

MODEL = tiny_model()
POLICY = qwen2_vl_policy(longest_edge=512)


def look(image, boxes, clock=None):
    """Features and grids of boxes, by the two steps that the engine takes."""
    clock = clock or Clock(MODEL.device)
    regions = perception.plan(MODEL.vision, image, boxes, POLICY, clock)
    return perception.look(MODEL, image, regions, clock), regions.grids


def test_looks_at_several_boxes_equal_looks_at_each():
    image = random_image(120, 200)
    boxes = [(0, 0, 200, 120), (10, 20, 90, 61), (0, 0, 1, 1)]
    features, grids = look(image, boxes)
    for box, feature, grid in zip(boxes, features, grids, strict=True):
        (alone,), _ = look(image, [box])
        assert len(feature) == grid[0] * grid[1] // 4
        assert torch.allclose(feature, alone, atol=1e-5)


def test_a_crop_is_seen_as_the_image_it_would_be():
    image = random_image(120, 200)
    left, top, right, bottom = box = (37, 0, 163, 75)
    (crop,), _ = look(image, [box])
    (image_of_crop,), _ = look(image[top:bottom, left:right].contiguous(), [(0, 0, 126, 75)])
    assert torch.equal(crop, image_of_crop)


@pytest.mark.parametrize("box", [(-1, 0, 10, 10), (0, 0, 201, 10), (0, 0, 10, 121), (10, 0, 10, 10), (20, 30, 10, 40)])
def test_boxes_that_are_empty_or_outside(box):
    with pytest.raises(ValueError, match=str(box[0])):
        look(random_image(120, 200), [box])


def test_stages_and_their_work():
    clock = Clock(MODEL.device)
    _, grids = look(random_image(120, 200), [(0, 0, 200, 120), (0, 0, 56, 84)], clock)
    patches = sum(height * width for height, width in grids)
    assert [stage.name for stage in clock.stages] == ["crop+embed", "ViT"]
    assert clock.stages[1].work == {"images": 2, "vit_patches": patches, "vit_calls": 1}
    assert all(stage.milliseconds > 0 for stage in clock.stages)


def test_re_encoding_adds_the_control_state_where_the_pads_are():
    state, width = tiny_state(), MODEL.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    features, control = torch.randn(12, width, generator=generator), torch.randn(1, width, generator=generator)
    embeds = torch.full((20, width), 7.0)
    perception.reencode_into(MODEL, features, control, embeds, 5, 12)
    norm = [state[f"clip_projector.layernorm_condition.{part}"] for part in ("weight", "bias")]
    linear = [state[f"clip_projector.linear_condition.{part}"] for part in ("weight", "bias")]
    key = F.linear(F.layer_norm(control, (width,), *norm), *linear)
    assert torch.allclose(embeds[5:17], features + (features @ key.T) * key, atol=1e-4)
    assert bool((embeds[:5] == 7).all()) and bool((embeds[17:] == 7).all())
    assert (embeds[5:17] - features).abs().max() > 0.1
