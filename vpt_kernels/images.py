"""Image input: anything that Pillow opens, or pixels, becomes one uint8 tensor."""

from __future__ import annotations

import io
import os
import struct
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own limit against decompression bombs (a quarter GiB of RGB)."""


def decode_image(image: Any, max_pixels: int = MAX_PIXELS, *, orient_files: bool = False) -> Tensor:
    """The stored pixels of `image` as RGB, uint8 [height, width, 3], contiguous.

    image: a PIL image, a path, the bytes of an image file, or pixels as a uint8 numpy array or tensor
    [height, width, 3]. Other modes (palette, grey, alpha, 16-bit, CMYK) are converted as Pillow's `convert("RGB")`
    does; of an animation the first frame counts. A tensor keeps its device.
    orient_files: turn the pixels of paths and bytes as the file's EXIF orientation says. A PIL image is never turned:
    its pixels are what its owner sees.
    Raises ValueError if the file cannot be read or the image exceeds `max_pixels`, TypeError for anything else.
    """
    if isinstance(image, Tensor):
        pixels = image
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"the image array is {image.dtype}; it must be uint8 with values 0..255: convert it first")
        # torch cannot express a read-only array or one with negative strides.
        usable = image.flags.writeable and all(stride >= 0 for stride in image.strides)
        pixels = torch.from_numpy(image if usable else image.copy())
    elif isinstance(image, Image.Image):
        _check_size(image.width, image.height, max_pixels)
        return _convert(image, "the image")
    elif isinstance(image, (str, os.PathLike)):
        return _open(image, f"image file {os.fspath(image)!r}", max_pixels, orient_files)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(image), f"the image of {len(image)} bytes", max_pixels, orient_files)
    else:
        raise TypeError(
            f"image is a {type(image).__name__}; pass a PIL image, a path, bytes, or uint8 [height, width, 3]"
        )
    if pixels.dtype != torch.uint8:
        raise TypeError(f"the image tensor is {pixels.dtype}; it must be uint8 with values 0..255: convert it first")
    if pixels.dim() != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"the image has shape {list(pixels.shape)}; it must be [height, width, 3] and not empty: "
            f"permute channels to the end, or pass a PIL image for other modes"
        )
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return pixels.contiguous()


def _open(source: Any, name: str, max_pixels: int, orient: bool) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                _check_size(image.width, image.height, max_pixels)
                return _convert(image, name, orient)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to open safely: {error}; downscale it first") from error
    except OSError as error:
        raise ValueError(
            f"{name} cannot be read: {error}; pass a complete file in a format that Pillow knows"
        ) from error


def _convert(image: Image.Image, name: str, orient: bool = False) -> Tensor:
    try:
        if orient:
            image = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
    # struct.error: from tags of an EXIF block that does not hold what it declares.
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"{name} cannot be decoded: {error}; pass a complete file") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"the image has {width}x{height} = {width * height} pixels, the limit is {max_pixels}: downscale it first, "
            f"or raise max_pixels"
        )
