"""The processor's pixels are transformers', bit for bit, and a model that gets its embeddings says the same."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tests.helpers import assert_same_bits, noise, photo
from tests.patch import foreign
from vpt_kernels import QwenVLImageProcessor, patch

LIMITS = {"min_pixels": 56 * 56, "max_pixels": 200_704}


def published(kind: str) -> Qwen2VLImageProcessorPil:
    if kind == "qwen3_vl":
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return Qwen2VLImageProcessorPil(patch_size=16, min_pixels=65_536, max_pixels=131_072, **half)
    return Qwen2VLImageProcessorPil(**LIMITS)


def levels(values: Tensor, processor: Qwen2VLImageProcessorPil) -> Tensor:
    """The uint8 patches (y, x, channel) behind transformers' pixel values of a still image."""
    p = processor.patch_size
    frames = values.double().reshape(len(values), 3, 2, p, p)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (processor.image_mean, processor.image_std))
    pixels = (frames[:, :, 0].permute(0, 2, 3, 1) * std + mean) * 255
    assert (pixels - pixels.round()).abs().max() < 1e-4
    return pixels.round().to(torch.uint8).flatten(1)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: foreign.qwen(kind) for kind in foreign.QWEN}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    sizes = ((61, 83), (401, 37), (29, 640), (3, 5), (470, 469))
    made = [Image.fromarray(noise(*size, "processor").numpy()) for size in sizes]
    made.append(Image.fromarray(photo(longest=600).numpy()))
    return [*made, made[0].convert("L"), made[1].convert("P"), made[0].convert("RGBA")]


@pytest.mark.parametrize("kind", foreign.QWEN)
def test_pixels_are_transformers(models, pictures, kind) -> None:
    theirs = published(kind)
    ours = QwenVLImageProcessor.of(models[kind], theirs)
    expected = theirs(images=pictures, return_tensors="pt")
    assert torch.equal(ours(pictures)["image_grid_thw"], expected["image_grid_thw"])
    assert_same_bits(ours.patches(pictures), levels(expected["pixel_values"], theirs))


def test_blocks_of_another_size(models, pictures) -> None:
    theirs = Qwen2VLImageProcessorPil(**LIMITS, merge_size=3)
    ours = QwenVLImageProcessor.of(models["qwen2_vl"], theirs)
    expected = theirs(images=pictures[0], return_tensors="pt")
    assert torch.equal(ours(pictures[0])["image_grid_thw"], expected["image_grid_thw"])
    assert_same_bits(ours.patches(pictures[0]), levels(expected["pixel_values"], theirs))


@pytest.mark.parametrize("kind", foreign.QWEN)
def test_a_model_says_the_same(models, pictures, kind) -> None:
    """`generate` with our embeddings and with transformers' pixel values; crops are crops of the picture."""
    model, theirs = models[kind], published(kind)
    ours = QwenVLImageProcessor.of(model, theirs)
    boxes = [(0, 0, 0, 83, 61), (1, 10, 20, 500, 420)]
    given = ours([pictures[0], pictures[5]], boxes)
    crops = [pictures[0], pictures[5].crop(boxes[1][1:])]
    expected = theirs(images=crops, return_tensors="pt")
    assert torch.equal(given["image_grid_thw"], expected["image_grid_thw"])
    made = foreign.prompt(model, [[tuple(grid[1:]) for grid in expected["image_grid_thw"].tolist()]])
    made.inputs["pixel_values"] = expected["pixel_values"]
    before_ids, before = foreign.generate(model, made)
    made.inputs["pixel_values"] = given["pixel_values"]
    with patch(model) as report:
        ids, logits = foreign.generate(model, made)
    assert (logits - before).abs().max() < 1e-4 < before.std() and torch.equal(ids, before_ids)
    assert report.calls["embedded already"] == 1 and not report.calls["linear"]


def test_kinds_of_input(models, pictures) -> None:
    processor = QwenVLImageProcessor.of(models["qwen2_vl"], published("qwen2_vl"))
    picture, file = pictures[0], io.BytesIO()
    picture.save(file, "PNG")
    expected = processor.patches(picture)
    array = np.array(picture)
    for source in ([picture], file.getvalue(), array, torch.from_numpy(array), [torch.from_numpy(array)]):
        assert_same_bits(processor.patches(source), expected)
    for wrong, error in (
        (torch.rand(4, 4, 3), TypeError),
        (b"no image", ValueError),
        (torch.zeros(3, 9, 8).byte(), ValueError),
    ):
        with pytest.raises(error):
            processor(wrong)
    with pytest.raises(ValueError, match="leaves image 0"):
        processor(picture, [(0, 0, 0, 84, 61)])
    with pytest.raises(ValueError, match="aspect ratio"):
        processor(noise(2, 402, "thin"))
    empty = processor([])
    assert empty["pixel_values"].shape == (0, 32) and empty["image_grid_thw"].shape == (0, 3)


def transparent() -> dict[str, Image.Image]:
    """Pictures of which half is transparent, in every mode that can say so."""
    colour = Image.fromarray(noise(90, 120, "transparent").numpy())
    alpha = Image.fromarray(noise(90, 120, "alpha").numpy()[:, :, 0])
    found = {"RGBA": colour.copy(), "LA": colour.convert("LA"), "P": colour.convert("P", palette=Image.ADAPTIVE)}
    found["RGBA"].putalpha(alpha)
    found["LA"].putalpha(alpha)
    found["P"].info["transparency"] = 7
    found |= {"RGB, one colour": colour.copy(), "PA": found["RGBA"].convert("PA")}
    found["RGB, one colour"].info["transparency"] = colour.getpixel((5, 5))
    return found


@pytest.mark.parametrize("mode", transparent())
def test_transparency_is_what_the_installed_transformers_makes_of_it(models, mode, tmp_path) -> None:
    theirs, picture = published("qwen2_vl"), transparent()[mode]
    ours = QwenVLImageProcessor.of(models["qwen2_vl"], theirs)
    expected = levels(theirs(images=picture, return_tensors="pt")["pixel_values"], theirs)
    assert_same_bits(ours.patches(picture), expected)
    if mode != "PA":  # which no format of files holds
        path = tmp_path / "transparent.png"
        picture.save(path)
        with Image.open(path) as stored:
            expected = levels(theirs(images=stored, return_tensors="pt")["pixel_values"], theirs)
        assert_same_bits(ours.patches(path), expected)
        assert_same_bits(ours.patches(path.read_bytes()), expected)


def test_transparency_is_asked_of_transformers(models, monkeypatch) -> None:
    """Not of its version: whatever its function makes of the picture is seen."""
    import transformers.image_transforms as theirs

    picture = transparent()["RGBA"]
    monkeypatch.setattr(theirs, "convert_to_rgb", lambda image: Image.new("RGB", image.size, (1, 2, 3)))
    patches = QwenVLImageProcessor.of(models["qwen2_vl"]).patches(picture)
    assert torch.equal(patches.view(-1, 3).unique(dim=0), torch.tensor([[1, 2, 3]], dtype=torch.uint8))


@pytest.mark.parametrize("change", ("hooks", "forward", "adapter", "parametrised", "offloaded", "patch embedding"))
def test_a_convolution_that_does_more_than_its_weight_says(change) -> None:
    """The processor has no forward of its own to fall back to: it raises."""
    model = foreign.qwen("qwen2_vl")
    embed = model.model.visual.patch_embed
    if change == "hooks":
        embed.proj.register_forward_hook(lambda *_: None)
    elif change == "forward":
        embed.proj.forward = lambda x: x
    elif change == "adapter":
        embed.proj = nn.Sequential(embed.proj)
    elif change == "parametrised":
        nn.utils.parametrizations.weight_norm(embed.proj)
    elif change == "offloaded":
        embed.proj.to("meta")
    else:
        embed.forward = lambda x: x
    with pytest.raises(ValueError, match="the patch embedding cannot be read from its weight: its .* merged"):
        QwenVLImageProcessor.of(model)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_as_transformers_turns_them(models, pictures, tmp_path, orientation) -> None:
    """A path and its bytes by EXIF; the opened picture and its pixels stay as they are stored."""
    theirs, path = published("qwen2_vl"), tmp_path / "turned.jpg"
    ours, exif = QwenVLImageProcessor.of(models["qwen2_vl"], theirs), Image.Exif()
    exif[0x0112] = orientation
    pictures[5].crop((0, 0, 200, 120)).save(path, exif=exif)
    for source, known in ((str(path), str(path)), (path, str(path)), (path.read_bytes(), str(path))):
        expected = theirs(images=known, return_tensors="pt")
        assert torch.equal(ours(source)["image_grid_thw"], expected["image_grid_thw"])
        assert_same_bits(ours.patches(source), levels(expected["pixel_values"], theirs))
    with Image.open(path) as stored:
        expected = levels(theirs(images=stored, return_tensors="pt")["pixel_values"], theirs)
        assert_same_bits(ours.patches(stored), expected)
        assert_same_bits(ours.patches(np.array(stored)), expected)


def test_a_broken_tag_beside_the_orientation_spoils_no_picture(models) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "title"
    Image.fromarray(noise(60, 90, "broken tag").numpy()).save(file, "JPEG", exif=exif)
    data = bytearray(file.getvalue())
    data[data.find(b"Exif") + 17] = 0x45  # the first tag's number: an integer tag that holds text
    processor = QwenVLImageProcessor.of(models["qwen2_vl"])
    found, expected = processor(bytes(data)), processor(file.getvalue())
    assert_same_bits(found["pixel_values"], expected["pixel_values"])
    (_, height, width), *_ = found["image_grid_thw"].tolist()
    assert height > width


def test_dtype_limits_and_order(models) -> None:
    weight = models["qwen2_vl"].model.visual.patch_embed.proj.weight.bfloat16()
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    processor = QwenVLImageProcessor(weight, **options, min_pixels=28 * 28, max_pixels=28 * 28 * 6)
    out = processor(noise(200, 300, "limits"))
    assert out["pixel_values"].dtype == torch.bfloat16
    assert out["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert processor.policy.pass_order == "installed"
    assert QwenVLImageProcessor(weight, **options, pass_order="hv").policy.pass_order == "hv"
    with pytest.raises(ValueError, match="min_pixels 9 and max_pixels 8"):
        QwenVLImageProcessor(weight, **options, min_pixels=9, max_pixels=8)
    with pytest.raises(ValueError, match="as many outputs as inputs"):
        QwenVLImageProcessor(torch.zeros(24, 3, 2, 2, 2), **options)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"do_normalize": False}, "do_normalize False"),
        ({"resample": 2}, "resample"),
        ({"patch_size": 16}, "patch_size 16; needed: 14"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    ],
)
def test_processors_that_do_something_else(models, change, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        QwenVLImageProcessor.of(models["qwen2_vl"], Qwen2VLImageProcessorPil(**LIMITS, **change))


@pytest.mark.parametrize(
    "attributes",
    [
        {"min_pixels": 56 * 56, "max_pixels": 50_176},
        {"min_pixels": 90_000, "max_pixels": 120_000},
        {"max_pixels": 50_176},  # transformers reads them only where both are set
        {"size": {"shortest_edge": 56 * 56, "longest_edge": 50_176}},
    ],
)
def test_limits_set_on_a_loaded_processor(models, pictures, attributes) -> None:
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 100_352})
    for name, value in attributes.items():
        setattr(theirs, name, value)
    expected = theirs(images=pictures, return_tensors="pt")["image_grid_thw"]
    assert torch.equal(QwenVLImageProcessor.of(models["qwen2_vl"], theirs)(pictures)["image_grid_thw"], expected)


@pytest.mark.parametrize("kind", foreign.QWEN)
def test_without_a_processor_the_limits_are_the_familys(models, kind) -> None:
    """As in the published preprocessor_config.json of each."""
    factor, low, high = (32, 65_536, 16_777_216) if kind == "qwen3_vl" else (28, 3136, 12_845_056)
    policy = QwenVLImageProcessor.of(models[kind]).policy
    for size in ((10, 10), (100, 100), (470, 469), (3700, 4700)):
        assert policy.fit(*size) == smart_resize(*size, factor=factor, min_pixels=low, max_pixels=high)


def test_a_crop_of_a_picture_beyond_the_limit_of_files(models, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    processor, picture = QwenVLImageProcessor.of(models["qwen2_vl"]), noise(120, 130, "large")
    crop = (0, 5, 7, 105, 107)
    assert_same_bits(processor.patches(picture, [crop]), processor.patches(picture[7:107, 5:105].contiguous()))
    with pytest.raises(ValueError, match="raise .*PIL.Image.MAX_IMAGE_PIXELS"):
        processor.patches(Image.fromarray(picture.numpy()), [crop])


def test_models_without_a_patch_embedding() -> None:
    with pytest.raises(ValueError, match="Linear has 0 patch embeddings"):
        QwenVLImageProcessor.of(nn.Linear(2, 2))
