"""Image files of every kind: our pixels are those of transformers' processors behind the published code's loading."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from tests.helpers import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, assert_same_bits, unpatchify
from vpt_kernels import decode_image, dinov2_policy, plan_regions, qwen2_vl_policy, roi_patches, sam_policy
from vpt_model.text.tokens import RegionSpan, crop_box

POLICIES = {
    "image": qwen2_vl_policy(longest_edge=512, pass_order="installed"),
    "dino": dinov2_policy(longest_edge=512, pass_order="installed"),
    "sam": sam_policy(longest_edge=1024, pass_order="installed"),
}
LONGEST_EDGES = {"image": 512, "dino": 512, "sam": 1024}
REGION = RegionSpan(frozenset({2, 5}), frozenset({4}))


def photo(mode: str, width: int, height: int) -> Image.Image:
    """Smooth colours with noise on them, in any mode."""
    noise = np.random.default_rng(width * height).integers(0, 64, (height, width, 4))
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11), np.cos((x - y) / 13)], -1)
    values = np.clip(waves * 90 + 96 + noise, 0, 255).astype(np.uint8)
    if mode == "P":
        return Image.fromarray(values[..., :3]).quantize(61)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257 - values[..., 1])
    if mode == "F":
        return Image.fromarray(values[..., 0].astype(np.float32) * 1.3 - 20.5)
    if mode == "I":
        return Image.fromarray(values[..., 0].astype(np.int32) * 2 - 99)
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, (width, height), values.tobytes())
    return Image.fromarray(values[..., :3]).convert(mode)


def rotated(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


# Name → mode, width, height, file type, options of saving.
FILES = {
    "rgb": ("RGB", 640, 480, "png", {}),
    "small, not enlarged": ("RGB", 224, 224, "png", {}),
    "jpeg, truncated edge": ("RGB", 561, 427, "jpg", {"quality": 92}),
    "jpeg, progressive": ("RGB", 725, 1100, "jpg", {"progressive": True}),
    "jpeg, grey": ("L", 1300, 411, "jpg", {}),
    "jpeg, cmyk": ("CMYK", 700, 500, "jpg", {}),
    "jpeg, rotated by exif": ("RGB", 900, 600, "jpg", {"exif": rotated(6)}),
    "png, mirrored by exif": ("RGB", 333, 777, "png", {"exif": rotated(7)}),
    "palette": ("P", 801, 534, "png", {}),
    "palette, small": ("P", 97, 61, "png", {}),
    "palette with transparency": ("P", 1200, 900, "png", {"transparency": 3}),
    "grey": ("L", 644, 483, "png", {}),
    "grey with alpha": ("LA", 571, 700, "png", {}),
    "alpha": ("RGBA", 1024, 768, "png", {}),
    "alpha, webp": ("RGBA", 600, 450, "webp", {"lossless": True}),
    "webp": ("RGB", 2000, 1125, "webp", {"quality": 80}),
    "16 bit": ("I;16", 690, 520, "png", {}),
    "float": ("F", 560, 420, "tiff", {}),
    "one bit": ("1", 1700, 2200, "png", {}),
    "32 bit": ("I", 513, 400, "tiff", {}),
    "lab": ("LAB", 640, 427, "tiff", {}),
    "27 px side": ("RGB", 300, 27, "png", {}),
    "27 px side, reduced": ("RGB", 27, 1100, "png", {}),
    "1:250": ("RGB", 4, 1000, "png", {}),
    "250:1, palette": ("P", 7000, 28, "png", {}),
    "one pixel": ("RGB", 1, 1, "png", {}),
    "animated gif": ("P", 610, 404, "gif", {"save_all": True, "append_images": [photo("P", 610, 404).rotate(180)]}),
    "animated webp": ("RGB", 530, 390, "webp", {"save_all": True, "append_images": [Image.new("RGB", (530, 390))]}),
    "bmp": ("RGB", 517, 333, "bmp", {}),
}


def published_loading(path: Path, kind: str, box: tuple[int, int, int, int] | None) -> Image.Image:
    """What the published code does to a file before a processor sees it, step by step."""
    image = Image.open(path)
    if box is not None:
        image = image.crop(box)
    edge = LONGEST_EDGES[kind]
    if max(image.width, image.height) > edge:
        factor = edge / max(image.width, image.height)
        width, height = int(image.width * factor), int(image.height * factor)
        image = image.resize((width, height), resample=Image.Resampling.NEAREST)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if min(image.width, image.height) < 28:
        width, height = max(image.width, 28), max(image.height, 28)
        image = image.resize((width, height), resample=Image.Resampling.NEAREST)
    if image.width / image.height > 200:
        image = image.resize((image.height * 180, image.height), resample=Image.Resampling.NEAREST)
    if image.height / image.width > 200:
        image = image.resize((image.width, image.width * 180), resample=Image.Resampling.NEAREST)
    # Processors of transformers ≥ 5.21 put the colour that it names on white; those of the published code did not.
    image.info.pop("transparency", None)
    return image


@cache
def processor(kind: str):
    if kind == "image":
        return Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    if kind == "dino":  # the published class loads the configuration of facebook/dinov2-base
        crop = {"height": 224, "width": 224}
        stats = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        return BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=crop, resample=3, **stats)
    return SamImageProcessorPil()


def normalised(pixels: Tensor, mean: tuple, std: tuple) -> Tensor:
    """uint8 [..., 3] → float32 as the processors do it: times 1/255 in double, the rest in float32."""
    scaled = (pixels.numpy().astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32))


def ours(path: Path, kind: str, box: tuple[int, int, int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    """uint8 patches as the engine makes them, and their grid."""
    image = decode_image(path, orient_files=False)  # the published code reads what is stored
    height, width, _ = image.shape
    plan = plan_regions([(height, width)], [(0, *(box or (0, 0, width, height)))], POLICIES[kind])
    return roi_patches([image], plan), plan.grids[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    for name, (mode, width, height, suffix, options) in FILES.items():
        photo(mode, width, height).save(made / f"{name}.{suffix}", **options)
    return made


@pytest.mark.parametrize("crop", [False, True], ids=["whole", "region"])
@pytest.mark.parametrize("name", FILES)
def test_images_and_regions(folder: Path, name: str, crop: bool) -> None:
    _, width, height, suffix, _ = FILES[name]
    if crop and min(width, height) < 8:
        with pytest.raises(ValueError, match="use an image of at least 8x8"):
            crop_box(REGION, 1, 1)
        return
    path, box = folder / f"{name}.{suffix}", crop_box(REGION, width, height) if crop else None
    patches, grid = ours(path, "image", box)
    want = processor("image")(images=[published_loading(path, "image", box)], return_tensors="pt")
    assert want["image_grid_thw"].tolist() == [[1, *grid]]
    values = normalised(patches.view(-1, 14, 14, 3), CLIP_MEAN, CLIP_STD).permute(0, 3, 1, 2)
    rows = values[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(patches), 1176)
    assert_same_bits(rows, want["pixel_values"])


@pytest.mark.parametrize("name", FILES)
def test_dino(folder: Path, name: str) -> None:
    path = folder / f"{name}.{FILES[name][3]}"
    patches, grid = ours(path, "dino", None)
    want = processor("dino")(images=[published_loading(path, "dino", None)], return_tensors="pt")
    values = normalised(unpatchify(patches, grid, 14), IMAGENET_MEAN, IMAGENET_STD)
    assert_same_bits(values.permute(2, 0, 1)[None], want["pixel_values"])


@pytest.mark.parametrize("name", FILES)
def test_sam(folder: Path, name: str) -> None:
    path = folder / f"{name}.{FILES[name][3]}"
    patches, grid = ours(path, "sam", None)
    want = processor("sam")(images=[published_loading(path, "sam", None)], return_tensors="pt")
    height, width = want["reshaped_input_sizes"][0].tolist()
    values = normalised(unpatchify(patches, grid, 16), IMAGENET_MEAN, IMAGENET_STD)
    inside = values[:height, :width].permute(2, 0, 1)[None]
    assert_same_bits(inside, want["pixel_values"][:, :, :height, :width].contiguous())
    # What lies outside is zero behind the normalisation, and no pixel before it.
    assert want["pixel_values"].count_nonzero() <= inside.numel()


def test_the_files_are_what_their_names_say(folder: Path) -> None:
    opened = {name: Image.open(folder / f"{name}.{FILES[name][3]}") for name in FILES}
    modes = {image.mode for image in opened.values()}
    assert {"RGB", "P", "L", "LA", "RGBA", "CMYK", "I;16", "F", "1", "I", "LAB"} <= modes
    for name, image in opened.items():
        assert image.size == FILES[name][1:3]
        assert ("exif" in name) == (0x0112 in image.getexif())
        assert ("animated" in name) == (getattr(image, "n_frames", 1) > 1)
