"""Image input: anything that Pillow opens, or pixels, becomes one uint8 tensor."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vpt_kernels.checks import require_flag, require_integer, require_type

ToRGB = Callable[[Image.Image], Image.Image | np.ndarray]
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs, in pixels (a quarter GiB of RGB), where nobody has changed it."""
ORIENTATION = 0x0112
"""EXIF's tag of how the stored pixels are to be turned; 1 is upright."""


def decode_image(
    image: Any, max_pixels: int | None = None, *, orient_files: bool = True, notices: list[str] | None = None
) -> Tensor:
    """Return the pixels of `image` as RGB, uint8 [height, width, 3], contiguous.

    image: a PIL image; a path, an open binary file or the bytes of an image file; or pixels as a uint8 numpy array or
    tensor [height, width, 3]. Other modes (palette, grey, alpha, 16-bit, CMYK) are converted as Pillow's
    `convert("RGB")` does, which drops transparency; of an animation the first frame counts. A tensor keeps its device,
    and the result shares memory with contiguous pixels: copy them before the call if their buffer is written again.
    max_pixels: largest image that is decoded; default: `PIL.Image.MAX_IMAGE_PIXELS`, and no limit for pixels, which
    are in memory already.
    orient_files: turn the pixels of files as their EXIF orientation says, so that they are upright. PIL images and
    pixels are never turned: they are what their owner made them.
    notices: a list that takes what the owner should know, which is a UserWarning without it: that the EXIF of a PIL
    image says that its pixels are not upright.
    Raises ValueError, which names the file and the cause, if the file cannot be read or the image exceeds `max_pixels`;
    TypeError for anything else.
    """
    require_type("notices", notices, (list, type(None)), "a list or None")
    if notice := orientation_notice(image):
        warnings.warn(notice, stacklevel=2) if notices is None else notices.append(notice)
    return pixels_of(image, max_pixels, orient_files=orient_files)


def pillow_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB as Pillow converts it: transparency is dropped, and what lies beneath it is seen."""
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
        require_integer("max_pixels", max_pixels, 1)
    if isinstance(image, (Tensor, np.ndarray)):
        return _pixels(image, max_pixels)
    max_pixels = max_pixels or Image.MAX_IMAGE_PIXELS
    if isinstance(image, Image.Image):
        _check_size("the image", *image.size, max_pixels)
        return _convert(image, "the image", False, to_rgb)
    if isinstance(image, (str, os.PathLike)):
        return _open(image, f"the image file {os.fspath(image)!r}", max_pixels, orient_files, to_rgb)
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
        return _open(io.BytesIO(data), f"the image of {len(data)} bytes", max_pixels, orient_files, to_rgb)
    if isinstance(image, io.TextIOBase):
        raise TypeError(f"the image file {getattr(image, 'name', '')!r} is open as text; open it with mode 'rb'")
    if callable(getattr(image, "read", None)):
        name = f"the image file {getattr(image, 'name', type(image).__name__)!r}"
        return _open(image, name, max_pixels, orient_files, to_rgb)
    raise TypeError(
        f"image is a {type(image).__name__}; pass a PIL image, a path, an open file, bytes, or uint8 [height, width, 3]"
    )


def orientation_notice(image: Any) -> str | None:
    """Return what to tell the owner of a PIL image whose EXIF says that its pixels are not upright; None for all
    else.
    """
    if not isinstance(image, Image.Image):
        return None
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # what cannot be read says nothing
        return None
    if orientation not in range(2, 9):
        return None
    return (
        f"the image's EXIF orientation is {orientation}, and a PIL image is taken as it is: pass its file, or "
        "PIL.ImageOps.exif_transpose(image), to have it upright"
    )


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
        raise ValueError(
            f"{name} cannot be read: {_cause(error)}; pass a complete file in a format that Pillow knows"
        ) from error
    with opened:
        _check_size(name, *opened.size, max_pixels)
        return _convert(opened, name, orient, to_rgb)


def _convert(image: Image.Image, name: str, orient: bool, to_rgb: ToRGB) -> Tensor:
    try:
        if orient:
            image = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(to_rgb(image)))
    except Exception as error:  # as in `_open`
        raise ValueError(f"{name} cannot be decoded: {_cause(error)}; pass a complete file") from error


def _cause(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _check_size(name: str, width: int, height: int, max_pixels: int | None) -> None:
    if not width * height:
        raise ValueError(f"{name} has {width}x{height} pixels: it is empty, and there is nothing to see; leave it out")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height} pixels, the limit is {max_pixels}: downscale it first; "
            "or, if you trust it, raise max_pixels of decode_image or PIL.Image.MAX_IMAGE_PIXELS, or pass its pixels"
        )
