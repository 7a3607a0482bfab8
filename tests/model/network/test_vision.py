"""The vision tower against transformers' with the same random weights, and `look` against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bench.transformers_model import transformers_model
from tests.model.inputs import random_image, tiny_config, tiny_model, tiny_state
from vpt_kernels import qwen2_vl_policy
from vpt_model.checkpoint import random_state
from vpt_model.network.fused.reference import rotate_packed
from vpt_model.network.model import Model
from vpt_model.network.vision import MEAN, STD

TOLERANCE = 1e-4
POLICY = qwen2_vl_policy(longest_edge=512)


@pytest.fixture(scope="module")
def published():
    return transformers_model(tiny_config(None), tiny_state(None), 300, 301).model.visual


def patches(grids, seed=0):
    """Normalised patches whose two frames differ."""
    count = sum(height * width for height, width in grids)
    return torch.randn(count, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def pillow_pixel_values(image, box, size):
    """What transformers' processor makes of a crop: float [N, 1176], both frames equal, merge-block order."""
    width, height = size
    resized = Image.fromarray(image.numpy()).crop(box).resize(size, Image.BICUBIC)
    pixels = (np.asarray(resized).astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    blocks = torch.from_numpy(pixels).view(height // 28, 2, 14, width // 28, 2, 14, 3)
    frame = blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, 14 * 14)
    return frame.expand(-1, 3, 2, -1).reshape(len(frame), -1)


@pytest.mark.parametrize("grids", [[(2, 2)], [(8, 12)], [(4, 6), (8, 2), (2, 10)]])
def test_equals_transformers(published, grids):
    tower, pixels = tiny_model(None).vision, patches(grids)
    with torch.no_grad():
        expected = published(pixels, torch.tensor([(1, *grid) for grid in grids])).pooler_output
    found = tower.forward(tower.embed_pixel_values(pixels), grids)
    assert found.shape == (len(pixels) // 4, 128)
    assert (found - expected).abs().max() <= TOLERANCE


def test_images_do_not_see_each_other():
    tower, grids = tiny_model(None).vision, [(4, 6), (8, 2)]
    embeds = tower.embed_pixel_values(patches(grids))
    together = tower.forward(embeds, grids)
    apart = torch.cat([tower.forward(embeds[:24], grids[:1]), tower.forward(embeds[24:], grids[1:])])
    assert (together - apart).abs().max() <= TOLERANCE


def test_position_of_a_patch_matters():
    tower = tiny_model(None).vision
    embeds = tower.embed_pixel_values(patches([(4, 6)]))
    assert (tower.forward(embeds, [(4, 6)]) - tower.forward(embeds, [(6, 4)])).abs().max() > 0.1


def test_look_equals_pillow_and_the_unfolded_weight():
    tower, image = tiny_model(None).vision, random_image(150, 200, seed=3)
    box, size = (13, 20, 181, 104), (168, 84)
    features, grids = tower.look([image], [(0, *box)], POLICY)
    assert grids == [(6, 12)]
    expected = tower.forward(tower.embed_pixel_values(pillow_pixel_values(image, box, size)), grids)
    assert (features[0] - expected).abs().max() <= TOLERANCE


def test_look_resizes_as_pillow():
    tower, image = tiny_model(None).vision, random_image(101, 150, seed=4)
    box, size = (0, 0, 150, 101), (140, 112)
    features, grids = tower.look([image], [(0, *box)], POLICY)
    assert grids == [(8, 10)]
    expected = tower.forward(tower.embed_pixel_values(pillow_pixel_values(image, box, size)), grids)
    assert (features[0] - expected).abs().max() <= TOLERANCE


def test_looks_at_several_boxes_of_several_images():
    tower = tiny_model(None).vision
    images = [random_image(90, 120, 5), random_image(60, 200, 6)]
    boxes = [(1, 0, 0, 200, 60), (0, 10, 10, 80, 80), (1, 50, 0, 150, 56)]
    features, grids = tower.look(images, boxes, POLICY)
    assert [len(part) for part in features] == [height * width // 4 for height, width in grids]
    for box, part, grid in zip(boxes, features, grids, strict=True):
        [alone], [shape] = tower.look(images, [box], POLICY)
        assert shape == grid
        assert (part - alone).abs().max() <= TOLERANCE


def test_bfloat16_is_as_close_as_transformers(published):
    pixels, grids = patches([(8, 12)]), [(8, 12)]
    thw = torch.tensor([(1, 8, 12)])
    state = random_state(tiny_config(None), 0, torch.bfloat16)
    tower = Model.from_state(tiny_config(None), state, weights=None).vision
    theirs = transformers_model(tiny_config(None), state, 300, 301).bfloat16().model.visual
    with torch.no_grad():
        exact = published(pixels, thw).pooler_output
        expected = theirs(pixels.bfloat16(), thw).pooler_output
    found = tower.forward(tower.embed_pixel_values(pixels), grids)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() <= 2 * (expected - exact).abs().mean()


def test_bfloat16_rotation_rounds_as_transformers():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    tower = tiny_model(None).vision
    cos, sin = tower.rotary([(4, 6)])
    x = torch.randn(24, 4, 16, generator=torch.Generator().manual_seed(8)).bfloat16()
    expected, _ = apply_rotary_pos_emb_vision(x, x, *(half[:, 0].repeat(1, 2) for half in (cos, sin)))
    assert torch.equal(rotate_packed(torch.stack([x, x, x], 1), cos, sin)[0], expected)


def test_grids_must_make_the_patches():
    tower = tiny_model(None).vision
    embeds = tower.embed_pixel_values(patches([(4, 6)]))
    for grids in ([(4, 4)], [(4, 6), (2, 2)], []):
        with pytest.raises(ValueError, match="24 patch embeddings"):
            tower.forward(embeds, grids)


def test_box_outside_its_image():
    with pytest.raises(ValueError, match="150"):
        tiny_model(None).vision.look([random_image(100, 140)], [(0, 0, 0, 150, 100)], POLICY)
