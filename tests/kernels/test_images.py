from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from tests.helpers import SEED
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_upright_and_what_is_in_memory_is_not_turned(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(), format="PNG", exif=exif)
    (tmp_path / "photo.png").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    stored, upright = np.array(opened), np.array(ImageOps.exif_transpose(opened))
    assert stored.shape == (9, 13, 3) and (upright.shape == (13, 9, 3)) == (orientation > 4)
    with (tmp_path / "photo.png").open("rb") as file:
        for source in (data, tmp_path / "photo.png", io.BytesIO(data), file):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert np.array_equal(decode_image(source).numpy(), upright)
                assert np.array_equal(decode_image(source, orient_files=False).numpy(), stored)
    notices = pytest.warns(UserWarning, match=f"orientation is {orientation}") if orientation > 1 else nullcontext()
    with notices:
        assert np.array_equal(decode_image(opened).numpy(), stored)
    told: list[str] = []
    for source in (opened, data, stored):
        decode_image(source, notices=told)
    assert len(told) == (orientation > 1) and all("exif_transpose" in notice for notice in told)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of tags with type, count and the four bytes of their value, as no library would write it."""
    rows = b"".join(struct.pack("<HHI", *head) + value for *head, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + b"\0" * 68


SIX = (0x0112, 3, 1, b"\6\0\0\0")
"""The orientation of a photo that was taken with the camera upright."""


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "metadata, turned",
    [
        (b"Exif\0\0garbage", False),
        (b"no EXIF at all", False),
        (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", False),
        (exif((0x0112, 3, 1, b"\x0b\0\0\0")), False),
        (exif((0x0112, 2, 2, b"6\0\0\0")), False),
        (exif(SIX, (0x0100, 1, 1, b"\0" * 4)), True),
        (exif((0x011A, 1, 1, b" \0\0\0"), SIX), True),
    ],
    ids=["no TIFF", "text", "cut short", "11", "text as orientation", "a width of bytes", "a resolution of bytes"],
)
def test_exif_that_cannot_be_read_or_written_spoils_no_picture(form, metadata, turned):
    """The last two still say how the picture is turned, and Pillow's `exif_transpose` raises."""
    data = saved(photo(), format=form, exif=metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = np.array(Image.open(io.BytesIO(data)))
        assert np.array_equal(decode_image(data), np.rot90(stored, -1) if turned else stored)
        assert np.array_equal(decode_image(data, orient_files=False), stored)


def test_a_tiff_turns_itself_and_nobody_is_told_otherwise():
    tags = Image.Exif()
    tags[0x0112] = 6
    data, told = saved(photo(), format="TIFF", exif=tags), list[str]()
    upright = np.rot90(np.array(photo()), -1)
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.array_equal(decode_image(source, notices=told), upright)
    assert told == []


def test_a_palette_with_degrees_of_transparency_warns_nobody():
    data = saved(photo("P"), format="PNG", transparency=bytes(range(17)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode_image(data), np.array(photo("P").convert("RGB")))


@pytest.mark.parametrize("address", ["https://a.b/c.png", "data:image/png;base64," + "iVBO" * 5000, "S3://a/b"])
def test_an_address_is_refused_in_one_line_with_what_to_do(address):
    with pytest.raises(ValueError, match="address: pass its bytes") as raised:
        decode_image(address)
    assert address[:50] in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("source", [b"", b"no picture", "x" * 5000, "missing.png"], ids=lambda source: source[:9])
def test_messages_are_the_same_each_time_and_bounded(source):
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be read") as raised:
            decode_image(source)
        messages.add(str(raised.value))
    assert len(messages) == 1 and len(messages.pop()) < 600


def test_open_files_are_read_and_stay_open(tmp_path):
    (tmp_path / "photo.png").write_bytes(PNG)
    expected = decode_image(PNG)
    with (tmp_path / "photo.png").open("rb") as file, zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("photo.png", PNG)
        for source in (file, io.BytesIO(PNG), io.BufferedReader(io.BytesIO(PNG)), archive.open("photo.png")):
            assert torch.equal(decode_image(source), expected) and not source.closed
        assert torch.equal(decode_image(memoryview(PNG[::-1])[::-1]), expected)
    with pytest.raises(ValueError, match="the image file .*photo.png.* cannot be read: .*closed"):
        decode_image(file)
    with (tmp_path / "photo.png").open() as file, pytest.raises(TypeError, match="photo.png.*mode 'rb'"):
        decode_image(file)


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


def test_every_remedy_of_the_limit_helps(monkeypatch):
    """The limit is Pillow's own, so that whoever raises that one raises ours; pixels are in memory already."""
    data = saved(Image.new("1", (400, 300)), format="PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="the limit is 100000") as raised:
        decode_image(data)
    assert all(remedy in str(raised.value) for remedy in ("max_pixels", "PIL.Image.MAX_IMAGE_PIXELS", "its pixels"))
    with pytest.warns(Image.DecompressionBombWarning):
        assert decode_image(data, max_pixels=120_000).shape == (300, 400, 3)
    assert decode_image(torch.zeros(300, 400, 3, dtype=torch.uint8)).shape == (300, 400, 3)
    for limit in (120_000, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode_image(data).shape == (300, 400, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match="too large to open safely.*PIL.Image.MAX_IMAGE_PIXELS"):
        decode_image(data, max_pixels=10**9)


def test_threads_leave_the_warning_filters_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        before = list(warnings.filters)
        for _ in range(20):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(decode_image, [PNG] * 32))
            assert list(warnings.filters) == before


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
        (Image.new("RGB", (0, 4)), ValueError, "0x4 pixels: it is empty"),
        (Image.new("L", (4, 0)), ValueError, "4x0 pixels: it is empty"),
        (torch.nested.nested_tensor([torch.zeros(4, 4, 3)]).to(torch.uint8), TypeError, "not nested"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta"), ValueError, "meta"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8).to_sparse(), TypeError, "sparse"),
        ("photo\0.png", ValueError, "cannot be read"),
        ("photo\ud800.png", ValueError, "cannot be read"),
        (".", ValueError, "'.' cannot be read"),
        (None, TypeError, "NoneType"),
        (7, TypeError, "int"),
    ],
    ids=lambda value: None if isinstance(value, (type, str)) else type(value).__name__,
)
def test_bad_images(source, error, message):
    with pytest.raises(error, match=message):
        decode_image(source)


def corrupted(form: str) -> Iterator[bytes]:
    """Files of a format with one to five bytes changed in their first 400."""
    draw, good = random.Random(SEED), saved(photo(size=(61, 43)), format=form)
    for trial in range(400):
        bad = bytearray(good)
        for _ in range(1 if form == "AVIF" else draw.choice((1, 2, 5))):
            place = trial % min(len(bad), 400) if form == "AVIF" else draw.randrange(min(len(bad), 256))
            bad[place] = 0 if form == "AVIF" else draw.choice((0, 127, 255, draw.randrange(256)))
        yield bytes(bad)


FORMS = [
    "AVIF",
    "BMP",
    "DDS",
    "GIF",
    "ICNS",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "SGI",
    "TGA",
    "TIFF",
    "WEBP",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_file_of_any_format_is_named_with_its_cause(form, tmp_path):
    """Decoders raise RuntimeError, AttributeError, ValueError …: all of it is the file's fault."""
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {form}")
    path = tmp_path / "broken"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in corrupted(form):
            path.write_bytes(data)
            for source, name in ((path, f"the image file {str(path)!r} "), (data, f"the image of {len(data)} bytes ")):
                try:
                    decode_image(source, max_pixels=1_000_000)
                except ValueError as error:
                    assert str(error).startswith(name) and len(str(error)) > len(name) + 30
    with pytest.raises(ValueError, match="cannot be"):
        path.write_bytes(saved(photo(size=(61, 43)), format=form)[:30])
        decode_image(path)


def test_oversized_text_of_a_png_is_named():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(ValueError, match="the image of .* bytes cannot be .*too large"):
        decode_image(saved(photo(), format="PNG", pnginfo=text))
