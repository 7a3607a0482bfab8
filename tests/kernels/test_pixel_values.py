"""Pixel values computed from `roi_patches` are bit for bit those of transformers' processors."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from tests.helpers import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    assert_same_bits,
    each_backend,
    noise,
    photo,
    unpatchify,
)
from tests.kernels.pillow_parity import regularize
from vpt_kernels import RegionPolicy, dinov2_policy, plan_regions, qwen2_vl_policy, roi_patches, sam_policy

IMAGES = {
    "photo": lambda: photo(longest=300),
    "tall": lambda: noise(401, 37, "pixel values"),
    "wide": lambda: noise(29, 640, "pixel values"),
    "tiny": lambda: noise(1, 3, "pixel values"),
    "square": lambda: noise(256, 256, "pixel values"),
    "odd": lambda: noise(257, 383, "pixel values"),
}
each_image = pytest.mark.parametrize("name", IMAGES)
each_edge = pytest.mark.parametrize("edge", (None, 100))


@cache
def processor(kind: str):
    if kind == "qwen2_vl":
        return Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=200_704)
    if kind == "dinov2":  # preprocessor_config.json of facebook/dinov2-base
        return BitImageProcessorPil(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            resample=3,
        )
    return SamImageProcessorPil()


def published(kind: str, image: Tensor, edge: int | None):
    pixels = Image.fromarray(image.numpy())
    return processor(kind)(images=[regularize(pixels, edge) if edge else pixels], return_tensors="pt")


def pixel_values(pixels: Tensor, mean: tuple, std: tuple) -> Tensor:
    """uint8 [..., 3] → float32 as the processors do: times 1/255 in double, then float32."""
    scaled = (pixels.numpy().astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32))


def whole(image: Tensor, policy: RegionPolicy, backend: str) -> tuple[Tensor, tuple[int, int]]:
    height, width = image.shape[:2]
    plan = plan_regions([(height, width)], [(0, 0, 0, width, height)], policy)
    return roi_patches([image], plan, backend=backend), plan.grids[0]


@each_backend
@each_image
@each_edge
def test_qwen2_vl(backend, name, edge):
    image = IMAGES[name]()
    policy = qwen2_vl_policy(max_pixels=200_704, longest_edge=edge, pass_order="installed")
    patches, grid = whole(image, policy, backend)
    want = published("qwen2_vl", image, edge)
    assert want["image_grid_thw"].tolist() == [[1, *grid]]
    values = pixel_values(patches.view(-1, 14, 14, 3), CLIP_MEAN, CLIP_STD)
    columns = values.permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)  # (channel, frame, y, x)
    assert_same_bits(columns.reshape(len(patches), 1176), want["pixel_values"])


@each_backend
@each_image
@each_edge
def test_dinov2(backend, name, edge):
    image = IMAGES[name]()
    patches, grid = whole(image, dinov2_policy(longest_edge=edge, pass_order="installed"), backend)
    values = pixel_values(unpatchify(patches, grid, 14), IMAGENET_MEAN, IMAGENET_STD)
    assert_same_bits(values.permute(2, 0, 1)[None], published("dinov2", image, edge)["pixel_values"])


@each_backend
@each_image
@each_edge
def test_sam(backend, name, edge):
    image = IMAGES[name]()
    patches, grid = whole(image, sam_policy(longest_edge=edge, pass_order="installed"), backend)
    assert grid == (64, 64)
    want = published("sam", image, edge)
    height, width = want["reshaped_input_sizes"][0].tolist()
    pixels = unpatchify(patches, grid, 16)
    outside = torch.ones(1024, 1024, dtype=torch.bool)
    outside[:height, :width] = False
    assert (pixels[outside] == 128).all()
    values = pixel_values(pixels, IMAGENET_MEAN, IMAGENET_STD)
    values[outside] = 0
    assert_same_bits(values.permute(2, 0, 1)[None], want["pixel_values"])
