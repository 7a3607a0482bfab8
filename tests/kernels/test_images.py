from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vpt_kernels import decode_image
from vpt_kernels.images import MAX_PIXELS


def photo(mode: str = "RGB", size: tuple[int, int] = (13, 9)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., :2].copy().view("<u2")[..., 0])
    if mode == "P":
        return Image.fromarray(values[..., :3]).quantize(17)
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, size, values.tobytes())
    return Image.fromarray(values[..., :3]).convert(mode)


def saved(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


FILES = {
    "palette": (photo("P"), "PNG"),
    "grey": (photo("L"), "PNG"),
    "grey with alpha": (photo("LA"), "PNG"),
    "alpha": (photo("RGBA"), "PNG"),
    "16 bit": (photo("I;16"), "PNG"),
    "one bit": (photo("1"), "PNG"),
    "cmyk": (photo("CMYK"), "JPEG"),
    "rgb": (photo("RGB"), "PNG"),
}


@pytest.mark.parametrize("image, form", FILES.values(), ids=FILES.keys())
def test_every_mode_becomes_what_pillow_makes_of_it(image, form, tmp_path):
    data = saved(image, format=form)
    (tmp_path / "image").write_bytes(data)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (data, bytearray(data), tmp_path / "image", str(tmp_path / "image"), Image.open(io.BytesIO(data))):
        decoded = decode_image(source)
        assert decoded.dtype == torch.uint8 and decoded.is_contiguous()
        assert np.array_equal(decoded.numpy(), expected)


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "I;16", "CMYK", "1"])
def test_nearest_reduction_may_follow_the_conversion(mode):
    image = photo(mode, (64, 48))
    before = image.resize((37, 29), Image.Resampling.NEAREST).convert("RGB")
    after = image.convert("RGB").resize((37, 29), Image.Resampling.NEAREST)
    assert before.tobytes() == after.tobytes()


def test_orientation_tags_are_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(photo(), format="PNG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert decode_image(data).shape == (9, 13, 3)


def test_of_an_animation_the_first_frame_counts():
    frames = [photo("L"), Image.new("L", (13, 9))]
    data = saved(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode_image(data).numpy(), np.array(frames[0].convert("RGB")))


def test_pixels_in_any_layout():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (pixels, frozen, pixels[::-1][::-1], np.asfortranarray(pixels), torch.from_numpy(pixels)):
            assert np.array_equal(decode_image(source).numpy(), pixels)
        assert np.array_equal(decode_image(pixels[::-1, ::2]).numpy(), pixels[::-1, ::2])


def test_images_over_the_limit_are_refused_before_they_are_decoded():
    class Unreadable(Image.Image):
        size = width, height = 20_000, 20_000

        def convert(self, mode):
            raise AssertionError("decoded")

    with pytest.raises(ValueError, match=f"400000000 pixels, the limit is {MAX_PIXELS}"):
        decode_image(Unreadable())
    huge = saved(Image.new("1", (30_000, 10_000)), format="PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="downscale"):
            decode_image(huge)
        with pytest.raises(ValueError, match="12x11 = 132 pixels, the limit is 131: downscale"):
            decode_image(saved(photo(size=(12, 11)), format="PNG"), max_pixels=131)
    with pytest.raises(ValueError, match="limit is 131"):
        decode_image(torch.zeros(11, 12, 3, dtype=torch.uint8), max_pixels=131)
    assert decode_image(photo(size=(12, 11)), max_pixels=132).shape == (11, 12, 3)


PNG, JPEG = (saved(photo(size=(64, 64)), format=form) for form in ("PNG", "JPEG"))


@pytest.mark.parametrize(
    "source, error, message",
    [
        (PNG[:-3000], ValueError, "cannot be decoded"),
        (JPEG[:-200], ValueError, "cannot be decoded"),
        (PNG[:20], ValueError, "cannot be"),
        (b"", ValueError, "cannot be read"),
        (b"not an image", ValueError, "cannot be read"),
        ("/nowhere/photo.png", ValueError, "/nowhere/photo.png"),
        (Image.open(io.BytesIO(PNG[:-3000])), ValueError, "cannot be decoded"),
        (np.zeros((4, 4, 3), np.float32), TypeError, "float32"),
        (torch.zeros(4, 4, 3), TypeError, "torch.float32"),
        (np.zeros((4, 4, 3), np.uint16), TypeError, "uint16"),
        (np.zeros((4, 4), np.uint8), ValueError, r"\[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, "permute"),
        (torch.zeros(4, 4, 4, dtype=torch.uint8), ValueError, r"\[4, 4, 4\]"),
        (torch.zeros(0, 4, 3, dtype=torch.uint8), ValueError, "not empty"),
        (None, TypeError, "NoneType"),
        (7, TypeError, "int"),
    ],
    ids=lambda value: None if isinstance(value, (type, str)) else type(value).__name__,
)
def test_bad_images(source, error, message):
    with pytest.raises(error, match=message):
        decode_image(source)
