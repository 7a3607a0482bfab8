"""`roi_patches` against Pillow itself, on random geometries; also a script, for other versions of Pillow:

PYTHONPATH=<unpacked Pillow wheel> python -m tests.kernels.pillow_parity --order installed --count 400
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from tests.helpers import BACKENDS, SEED, numbers, patchify
from vpt_kernels import RegionPolicy, plan_regions, roi_patches

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_WORK = 3_000_000
"""Pixels of a case's image, and of its result: keeps hundreds of cases within seconds."""


@dataclass(frozen=True)
class Case:
    kind: str
    image: Tensor
    box: tuple[int, int, int, int]
    out: tuple[int, int]
    resample: str
    patch: int
    merge: int
    edge: int | None
    window: tuple[int, int] | None
    anchor: str

    def __str__(self) -> str:
        size = "x".join(map(str, self.image.shape[:2]))
        return (
            f"{self.kind}: image {size} box {self.box} → {self.out} {self.resample} patch {self.patch} merge "
            f"{self.merge} edge {self.edge} window {self.window} {self.anchor}"
        )

    def policy(self, order: str) -> RegionPolicy:
        return RegionPolicy(
            fit=lambda height, width: self.out,
            patch_size=self.patch,
            merge_size=self.merge,
            resample=self.resample,
            pass_order=order,
            regularize_edge=self.edge,
            window=self.window,
            anchor=self.anchor,
        )


KINDS = (
    "photo",
    "log",
    "border",
    "pixel",
    "line",
    "tall",
    "wide",
    "keep",
    "enlarge",
    "shrink",
    "nearest",
    "centre",
    "pad",
)


def cases(count: int, seed: int = SEED, kinds: tuple[str, ...] = KINDS) -> Iterator[Case]:
    """Those of `count` cases, going round `KINDS`, that are of the given kinds."""
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        if kind in kinds:
            yield _case(kind, numbers("pillow", seed, number))


def _case(kind: str, rng: np.random.Generator) -> Case:
    def size(largest: int = 3000, smallest: int = 1) -> int:
        return int(round(np.exp(rng.uniform(np.log(smallest), np.log(largest)))))

    def choose(*options: object) -> object:
        return options[rng.integers(len(options))]

    height, width = (int(rng.integers(200, 3001)) for _ in range(2)) if kind == "photo" else (size(), size())
    if kind == "tall":
        width = size(15)
        height = int(np.clip(width * rng.integers(60, 201), 1, 3000))
    elif kind == "wide":
        height = size(15)
        width = int(np.clip(height * rng.integers(60, 201), 1, 3000))
    while height * width > MAX_WORK:
        height, width = (height + 1) // 2, width
    left, top = int(rng.integers(width)), int(rng.integers(height))
    right, bottom = int(rng.integers(left + 1, width + 1)), int(rng.integers(top + 1, height + 1))
    if kind == "photo":  # two to eight cells of an 8×8 grid
        cells = rng.integers(2, 9, 2)
        column, row = (int(rng.integers(0, 9 - n)) for n in cells)
        left, right = int(column * width / 8), int((column + cells[0]) * width / 8)
        top, bottom = int(row * height / 8), int((row + cells[1]) * height / 8)
    elif kind in ("tall", "wide", "shrink"):
        left, top, right, bottom = 0, 0, width, height
    elif kind == "border":
        if rng.random() < 0.5:
            left = 0
        else:
            right = width
        if rng.random() < 0.5:
            top = 0
        else:
            bottom = height
    elif kind == "pixel":
        right, bottom = left + 1, top + 1
    elif kind == "line":
        if rng.random() < 0.5:
            right = left + 1
        else:
            bottom = top + 1
    box_h, box_w = bottom - top, right - left
    out_h, out_w = size(900), size(900)
    patch, merge, edge, window, anchor = 1, 1, None, None, "top_left"
    if kind == "photo":
        patch, merge, edge = 14, 2, choose(None, 512)
        out_h, out_w = (28 * int(rng.integers(4, 20)) for _ in range(2))
    elif kind == "keep":
        out_h, out_w = choose((box_h, size(600)), (size(600), box_w), (box_h, box_w))
    elif kind == "enlarge":
        out_h, out_w = min(box_h * int(rng.integers(1, 9)), 900), min(box_w * int(rng.integers(1, 9)), 900)
    elif kind in ("tall", "wide") and rng.random() < 0.4:  # enlarged: Pillow 12.2's pass order depends on it
        out_h, out_w = min(box_h + size(300), 3000), min(box_w + size(300), 3000)
    elif kind == "shrink":
        out_h, out_w = int(rng.integers(1, 17)), int(rng.integers(1, 17))
    elif kind == "nearest":
        edge = int(choose(512, 224, 100, 28, 1024))
    elif kind == "centre":
        window = int(rng.integers(1, out_h + 1)), int(rng.integers(1, out_w + 1))
        anchor = "center"
    elif kind == "pad":
        patch = int(choose(1, 7, 16))
        longest = patch * (1 + size(300) // patch)
        other = int(rng.integers(1, longest + 1))
        out_h, out_w = choose((longest, other), (other, longest))
        window = longest, longest
    if kind in ("log", "border", "tall", "wide", "enlarge", "nearest", "line") and rng.random() < 0.5:
        patch, merge = choose((14, 2), (14, 1), (16, 1), (16, 2), (2, 3), (5, 2))
        block = patch * merge
        out_h, out_w = block * (1 + out_h // block), block * (1 + out_w // block)
    while out_h * out_w > MAX_WORK:
        out_h //= 2
    image = _content(rng, height, width)
    return Case(
        kind,
        image,
        (left, top, right, bottom),
        (out_h, out_w),
        str(choose(*FILTERS)),
        patch,
        merge,
        edge,
        window,
        anchor,
    )


def _content(rng: np.random.Generator, height: int, width: int) -> Tensor:
    kind = rng.integers(4)
    if kind == 0:  # black and white: both clamps of the bicubic overshoot
        pixels = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    elif kind == 1:  # ramps: many values that lie next to a rounding boundary
        rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
        pixels = ((rows * rng.integers(1, 9, 3) + columns * rng.integers(1, 9, 3)) // 3 % 256).astype(np.uint8)
    else:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def resize(image: Image.Image, size: tuple[int, int], kind: Image.Resampling, order: str) -> Image.Image:
    """Pillow's resize to (width, height); "hv" is the pass order of Pillow ≤ 12.1, whatever version is installed."""
    if order == "hv" and PILLOW >= (12, 2):
        image = image.resize((size[0], image.height), kind)
    return image.resize(size, kind)


def regularize(image: Image.Image, edge: int) -> Image.Image:
    """LLaMA-Factory's steps; it fails where a side would become zero, one pixel is meant."""
    nearest = Image.Resampling.NEAREST
    if max(image.width, image.height) > edge:
        factor = edge / max(image.width, image.height)
        image = image.resize((max(int(image.width * factor), 1), max(int(image.height * factor), 1)), nearest)
    if min(image.width, image.height) < 28:
        image = image.resize((max(image.width, 28), max(image.height, 28)), nearest)
    if image.width / image.height > 200:
        image = image.resize((image.height * 180, image.height), nearest)
    if image.height / image.width > 200:
        image = image.resize((image.width, image.width * 180), nearest)
    return image


def expected(case: Case, order: str) -> Tensor:
    """The patches by Pillow: crop, regularise, resize, place in the window, cut."""
    image = Image.fromarray(case.image.numpy()).crop(case.box)
    if case.edge is not None:
        image = regularize(image, case.edge)
    out_h, out_w = case.out
    pixels = torch.from_numpy(np.array(resize(image, (out_w, out_h), FILTERS[case.resample], order)))
    if case.window is not None:
        height, width = case.window
        if case.anchor == "center":
            top, left = (out_h - height) // 2, (out_w - width) // 2
            pixels = pixels[top : top + height, left : left + width]
        else:
            canvas = torch.full((height, width, 3), 128, dtype=torch.uint8)
            canvas[:out_h, :out_w] = pixels
            pixels = canvas
    return patchify(pixels, case.patch, case.merge)


def mismatch(case: Case, order: str, backend: str) -> str | None:
    """None if every byte agrees, else a description."""
    plan = plan_regions([tuple(case.image.shape[:2])], [(0, *case.box)], case.policy(order))
    actual = roi_patches([case.image], plan, backend=backend)
    want = expected(case, order)
    if actual.shape != want.shape or actual.dtype != want.dtype:
        return f"{case}: shape {tuple(actual.shape)}, Pillow {tuple(want.shape)}"
    wrong = (actual.int() - want.int()).abs()
    if wrong.any():
        return f"{case}: {int((wrong > 0).sum())} of {wrong.numel()} bytes differ, by up to {int(wrong.max())}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", choices=("hv", "installed"), default="installed")
    parser.add_argument("--count", type=int, default=360)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all")
    options = parser.parse_args()
    failures = []
    backends = options.backend or BACKENDS
    for case in cases(options.count, options.seed):
        failures += [f"{name}: {text}" for name in backends if (text := mismatch(case, options.order, name))]
    for text in failures:
        print(text)
    print(
        f"Pillow {PIL.__version__}, pass order {options.order}, seed {options.seed}, backends {', '.join(backends)}: "
        f"{options.count} geometries, {len(failures)} mismatches"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
