"""Image input: anything that Pillow opens, or pixels, becomes one uint8 tensor."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vpt_kernels.checks import require_flag, require_integer, require_type

ToRGB = Callable[[Image.Image], Image.Image | np.ndarray]
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs, in pixels (a quarter GiB of RGB), where nobody has changed it."""
ORIENTATION = 0x0112
"""EXIF's tag of how the stored pixels are to be turned; 1 is upright."""
_ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    image: Any, max_pixels: int | None = None, *, orient_files: bool = True, notices: list[str] | None = None
) -> Tensor:
    """Return the pixels of `image` as RGB, uint8 [height, width, 3], contiguous.

    image: a PIL image; a path, an open binary file or the bytes of an image file; or pixels as a uint8 numpy array or
    tensor [height, width, 3]. Other modes (palette, grey, alpha, 16-bit, CMYK) are converted as Pillow's
    `convert("RGB")` does, which drops transparency; of a file with several frames the first counts, of a PIL image the
    one that it stands at. A tensor keeps its device, and the result shares memory with contiguous pixels: copy them
    before the call if their buffer is written again.
    max_pixels: largest image that is decoded; default: `PIL.Image.MAX_IMAGE_PIXELS`, and no limit for pixels, which
    are in memory already.
    orient_files: turn the pixels of files as their EXIF orientation says, so that they are upright; EXIF that cannot be
    read says nothing. PIL images and pixels are never turned: they are what their owner made them.
    notices: a list that takes what the owner should know, which is a UserWarning without it: that the EXIF of a PIL
    image says that its pixels are not upright.
    Raises ValueError, which names the file and the cause, if the file cannot be read or the image exceeds `max_pixels`;
    TypeError for anything else.
    """
    require_type("notices", notices, (list, type(None)), "a list or None")
    pixels = pixels_of(image, max_pixels, orient_files=orient_files)
    # Afterwards: a TIFF turns itself while it is read, and then says that it is upright.
    if notice := orientation_notice(image):
        warnings.warn(notice, stacklevel=2) if notices is None else notices.append(notice)
    return pixels


def pillow_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB as Pillow converts it: transparency is dropped, and what lies beneath it is seen."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Pillow warns where it drops one degree of transparency per colour, and nowhere else.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels_of(
    image: Any,
    max_pixels: int | None = None,
    *,
    orient_files: bool = True,
    to_rgb: ToRGB = pillow_rgb,
) -> Tensor:
    """Do `decode_image` without its warning. to_rgb: how an image that Pillow opened becomes RGB."""
    require_flag("orient_files", orient_files)
    if max_pixels is not None:
        max_pixels = require_integer("max_pixels", max_pixels, 1)
    if isinstance(image, (Tensor, np.ndarray)):
        return _pixels(image, max_pixels)
    max_pixels = max_pixels or Image.MAX_IMAGE_PIXELS
    if isinstance(image, Image.Image):
        _check_size("the image", *image.size, max_pixels)
        return _convert(image, "the image", False, to_rgb)
    if isinstance(image, (str, os.PathLike)):
        return _open(image, _named(os.fspath(image)), max_pixels, orient_files, to_rgb)
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
        return _open(io.BytesIO(data), f"the image of {len(data)} bytes", max_pixels, orient_files, to_rgb)
    if isinstance(image, io.TextIOBase):
        raise TypeError(f"the image file {getattr(image, 'name', '')!r} is open as text; open it with mode 'rb'")
    if callable(getattr(image, "read", None)):
        name = _named(getattr(image, "name", type(image).__name__))
        return _open(image, name, max_pixels, orient_files, to_rgb)
    raise TypeError(
        f"image is a {type(image).__name__}; pass a PIL image, a path, an open file, bytes, or uint8 [height, width, 3]"
    )


def orientation_notice(image: Any) -> str | None:
    """Return what to tell the owner of a PIL image whose EXIF says that its pixels are not upright; None for all
    else.
    """
    if not isinstance(image, Image.Image) or (orientation := _orientation(image)) == 1:
        return None
    return (
        f"the image's EXIF orientation is {orientation}, and a PIL image is taken as it is: pass its file, or "
        "PIL.ImageOps.exif_transpose(image), to have it upright"
    )


def _orientation(image: Image.Image) -> int:
    """Return how EXIF says that the pixels are to be turned, 2 to 8; 1 where it says nothing that can be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
        return int(found) if found in _TURNS else 1
    except Exception:  # as in `_open`
        return 1


def _pixels(image: Tensor | np.ndarray, max_pixels: int | None) -> Tensor:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"the image array is {image.dtype}; it must be uint8 with values 0..255: convert it first")
        # torch cannot express a read-only array or one with negative strides.
        usable = image.flags.writeable and all(stride >= 0 for stride in image.strides)
        image = torch.from_numpy(image if usable else image.copy())
    if image.dtype != torch.uint8 or image.layout != torch.strided or image.is_nested:
        raise TypeError(
            f"the image tensor is {image.dtype}, {image.layout}; it must be uint8 with values 0..255 and strided, "
            "not nested: convert it first"
        )
    if image.dim() != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"the image has shape {list(image.shape)}; it must be [height, width, 3] and not empty: "
            f"permute channels to the end, or pass a PIL image for other modes"
        )
    if image.is_meta:
        raise ValueError("the image tensor is on the meta device, which holds no pixels; pass it on the CPU or a GPU")
    _check_size("the image", image.shape[1], image.shape[0], max_pixels)
    return image.contiguous()


def _open(source: Any, name: str, max_pixels: int | None, orient: bool, to_rgb: ToRGB) -> Tensor:
    try:
        opened = Image.open(source)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} is too large to open safely: {error}; downscale it first, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    # Decoders of broken files raise whatever their code runs into, not only OSError.
    except Exception as error:
        remedy = "pass a complete file in a format that Pillow knows"
        if isinstance(source, str) and _ADDRESS.match(source):
            remedy = "nothing is fetched or decoded from an address: pass its bytes, or a file that holds them"
        raise ValueError(f"{name} cannot be read: {_cause(error)}; {remedy}") from error
    with opened:
        _check_size(name, *opened.size, max_pixels)
        return _convert(opened, name, orient, to_rgb)


def _convert(image: Image.Image, name: str, orient: bool, to_rgb: ToRGB) -> Tensor:
    try:
        # Some formats have their EXIF behind the pixels.
        image.load()
        if orient and (orientation := _orientation(image)) > 1:
            image = image.transpose(_TURNS[orientation])
        return torch.from_numpy(np.array(to_rgb(image)))
    except Exception as error:  # as in `_open`
        raise ValueError(f"{name} cannot be decoded: {_cause(error)}; pass a complete file") from error


def _named(file: Any) -> str:
    return f"the image file {file!r:.300}"


def _cause(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message names an object of ours
        return "it is in no format that Pillow knows"
    # An error of the system repeats the name, of whatever length.
    return getattr(error, "strerror", None) or str(error).strip() or type(error).__name__


def _check_size(name: str, width: int, height: int, max_pixels: int | None) -> None:
    if not width * height:
        raise ValueError(f"{name} has {width}x{height} pixels: it is empty, and there is nothing to see; leave it out")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height} pixels, the limit is {max_pixels}: downscale it first; "
            "or, if you trust it, raise max_pixels of decode_image or PIL.Image.MAX_IMAGE_PIXELS, or pass its pixels"
        )
