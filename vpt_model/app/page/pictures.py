"""Pictures that visitors bring, and those that are drawn for them; both stay in memory and are never written."""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt_kernels import decode_image
from vpt_model.mini.scenes import KINDS, Scene, make_question, make_scene

PREVIEW = 1280
"""Pixels of the longer edge of what the browser shows."""
SEEDS = 1 << 20
_VARIATIONS = 24
# Formats that browsers send and Pillow decodes in C; a picture needs no PostScript interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF")


@dataclass
class Picture:
    """A visitor's picture: upright pixels, uint8 [height, width, 3]. scene: what is known of it, where we drew it."""

    pixels: Tensor
    scene: dict[str, Any] | None = None
    truths: dict[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def as_json(self) -> dict[str, Any]:
        """Return all that the browser gets of it."""
        width, height = self.size
        known = {"width": width, "height": height, "preview": preview(self.pixels.numpy())}
        return {"id": self.id, **known, "scene": self.scene}


def uploaded(data: bytes, limit: int) -> Picture:
    """Return the picture in the bytes of a file. Raises ValueError, for its owner, if it is broken or has > limit
    pixels.
    """
    if not data:
        raise ValueError("The file is empty: choose a picture.")
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as opened:
            width, height = opened.size
    except Exception as error:  # decoders of broken files raise whatever their code runs into
        raise ValueError(
            "This is no picture that can be read here: choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file."
        ) from error
    if width * height > limit:
        raise ValueError(
            f"The picture has {width}×{height} = {width * height / 1e6:.1f} million pixels, the limit is "
            f"{limit / 1e6:.0f} million: make it smaller and try again."
        )
    try:
        return Picture(decode_image(data, limit))
    except ValueError as error:
        raise ValueError("The picture is damaged, or its file is cut short: it cannot be decoded.") from error


def drawn(seed: int | None) -> Picture:
    """Return a picture of vpt-mini's test split, with questions about it and their answers.

    Raises ValueError without the photographs that it is drawn on.
    """
    seed = secrets.randbelow(SEEDS) if seed is None else seed
    scene = make_scene(seed, "test")
    asked = [make_question(scene, kind, seed) for kind in KINDS]
    known = {
        "seed": seed,
        "things": [
            {"colour": t.colour, "shape": t.shape, "tag": t.tag, "column": t.column, "row": t.row} for t in scene.things
        ],
        "questions": [{"kind": q.kind, "text": q.text, "answer": q.answer, "look": q.look} for q in asked],
    }
    truths = _truths(scene) | {q.text: q.answer for q in asked}
    return Picture(torch.from_numpy(scene.pixels), known, truths)


def _truths(scene: Scene) -> dict[str, str]:
    """Return the answers to questions that the task asks about a scene."""
    every = (make_question(scene, kind, seed) for kind in KINDS for seed in range(_VARIATIONS))
    return {question.text: question.answer for question in every}


def preview(pixels: np.ndarray) -> str:
    """Return the pixels as a data URL, made smaller where they are more than a page shows; small ones lose nothing."""
    image = Image.fromarray(pixels)
    if max(image.size) <= 640:
        return data_url(image)
    image.thumbnail((PREVIEW, PREVIEW))
    return data_url(image, "JPEG")


def data_url(image: Image.Image, form: str = "PNG") -> str:
    """Return an image as a data URL; PNG, quickly packed, unless another format is given."""
    out = BytesIO()
    image.save(out, form, **({"compress_level": 1} if form == "PNG" else {"quality": 90}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
