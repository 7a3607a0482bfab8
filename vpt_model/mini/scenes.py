"""The pictures and questions that vpt-mini is trained and tested on: tagged objects on real photographs.

A scene is a photograph with three to five objects (colour × shape), each of which carries a small tag with two
characters. The first look, reduced to 112 pixels, shows where an object is but not what its tag says; the crop of the
3×3 cells around it is shown pixel by pixel and does. Seeded: the same seed, split and Pillow make the same pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vpt_model.text.tokens import GRID, RegionSpan, crop_box

SIDE = 298
"""Width and height of a picture: the largest of which 3×3 of the 8×8 cells never exceed 112 pixels."""
SYMBOLS = "ACEFHJKLMNPRTUVXY347"
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 20),
    "purple": (150, 50, 180),
    "orange": (245, 130, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("tag", "two tags", "attribute", "count")
"""Kinds of question: one region, two regions, no second look, the re-encoded image ("clip")."""

PHOTOS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "clock_motion.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
    ),
    "test": ("chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg"),
}
"""Photographs that scikit-image ships; no scene of one split shows a photograph of the other."""

_SPLITS = {"train": 0, "test": 1}
_INNER = range(1, GRID - 1)
# Between cells that hold objects, so that a crop shows one object whole.
_SPACING = 2
_FONT_SIZE, _ADVANCE, _TAG, _TAG_RISE = 14, 14, (32, 18), 7
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object: what it looks like, what its tag says, and the cell of the 8×8 grid that holds its centre."""

    colour: str
    shape: str
    tag: str
    column: int
    row: int

    @property
    def look(self) -> str:
        """The forced look that shows it."""
        return f"x{self.column},y{self.row},x{self.column},y{self.row}"


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 [SIDE, SIDE, 3], and what is on it."""

    pixels: np.ndarray
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene. `look` is the path that answers it as `parse_look` reads it; None: the first look."""

    kind: str
    text: str
    answer: str
    look: str | None
    things: tuple[Thing, ...] = ()


def make_scene(seed: int, split: str) -> Scene:
    """Return the scene of a seed. Raises ValueError for an unknown split, or without scikit-image's photographs."""
    if split not in PHOTOS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(PHOTOS)}")
    random = np.random.default_rng([_SPLITS[split], seed])
    things = _things(random)
    return Scene(_paint(random, things, split), things)


def make_question(scene: Scene, kind: str, seed: int) -> Question:
    """Return a question of `kind` about the scene, one for each seed. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    random = np.random.default_rng([2, KINDS.index(kind), seed])
    things = [scene.things[i] for i in random.permutation(len(scene.things))]
    if kind == "tag":
        thing = things[0]
        text = f"What is on the tag of the {thing.colour} {thing.shape}?"
        return Question(kind, text, thing.tag, f"region:{thing.look}", (thing,))
    if kind == "two tags":
        a, b = things[:2]
        text = f"What is on the tags of the {a.colour} {a.shape} and the {b.colour} {b.shape}?"
        return Question(kind, text, f"{a.tag} {b.tag}", f"region:{a.look}+{b.look}", (a, b))
    colours, shapes = Counter(t.colour for t in things), Counter(t.shape for t in things)
    if kind == "attribute":
        asked = [
            Question(kind, f"What colour is the {t.shape}?", t.colour, None, (t,))
            for t in things
            if shapes[t.shape] == 1
        ]
        asked += [
            Question(kind, f"What shape is the {t.colour} object?", t.shape, None, (t,))
            for t in things
            if colours[t.colour] == 1
        ]
        return asked[random.integers(len(asked))]
    # Half of the counts are about the first object's colour, which several objects share.
    colour = scene.things[0].colour if random.random() < 0.5 else str(random.choice(list(COLOURS)))
    return Question(kind, f"How many objects are {colour}?", str(colours[colour]), "clip")


def crop(scene: Scene, thing: Thing) -> np.ndarray:
    """Return the pixels that a look at the thing's cell shows, in the original's resolution."""
    left, top, right, bottom = crop_box(RegionSpan(frozenset([thing.column]), frozenset([thing.row])), SIDE, SIDE)
    return scene.pixels[top:bottom, left:right]


def fingerprint() -> str:
    """Return the SHA-256 of this generator's source without its imports: weights belong to the pictures they were
    trained on.
    """
    lines = Path(__file__).read_bytes().splitlines(keepends=True)
    return hashlib.sha256(b"".join(line for line in lines if not line.startswith((b"import ", b"from ")))).hexdigest()


def _things(random: np.random.Generator) -> tuple[Thing, ...]:
    while True:
        count, alike = int(random.integers(3, 6)), int(random.integers(1, 4))
        shared = random.integers(len(COLOURS))
        others = [i for i in random.permutation(len(COLOURS) * len(SHAPES)) if i // len(SHAPES) != shared]
        looks = [shared * len(SHAPES) + shape for shape in random.permutation(len(SHAPES))[:alike]]
        looks = [*looks, *others][:count]
        colours, shapes = Counter(i // len(SHAPES) for i in looks), Counter(i % len(SHAPES) for i in looks)
        cells = _cells(random, count)
        # An attribute can be asked for only where another one tells the object from the rest.
        if cells and 1 in (*colours.values(), *shapes.values()):
            break
    names = list(COLOURS)
    return tuple(
        Thing(names[look // len(SHAPES)], SHAPES[look % len(SHAPES)], _tag(random), *cell)
        for look, cell in zip(looks, cells, strict=True)
    )


def _cells(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Return cells (column, row) that keep their distance; none where the random ones leave no room."""
    free, chosen = [(x, y) for x in _INNER for y in _INNER], []
    while free and len(chosen) < count:
        x, y = free[random.integers(len(free))]
        chosen.append((x, y))
        free = [cell for cell in free if max(abs(cell[0] - x), abs(cell[1] - y)) >= _SPACING]
    return chosen if len(chosen) == count else []


def _tag(random: np.random.Generator) -> str:
    return "".join(SYMBOLS[i] for i in random.integers(len(SYMBOLS), size=2))


def _paint(random: np.random.Generator, things: tuple[Thing, ...], split: str) -> np.ndarray:
    photos = _photos(split)
    picture = _background(random, photos[random.integers(len(photos))])
    cell = SIDE / GRID
    for thing in things:
        x, y = ((place + 0.5) * cell + random.uniform(-JITTER, JITTER) for place in (thing.column, thing.row))
        size = int(random.integers(40, 47))
        colour = tuple(int(c) for c in np.clip(np.array(COLOURS[thing.colour]) + random.integers(-15, 16, 3), 0, 255))
        left, top = round(x - size / 2), round(y - size / 2)
        picture.paste((25, 25, 25), (left - 2, top - 2), _mask(thing.shape, size + 4))
        picture.paste(colour, (left, top), _mask(thing.shape, size))
        width, height = _TAG
        left, top = round(x - width / 2), round(y - _TAG_RISE - height / 2)
        paper, ink = int(random.integers(225, 256)), int(random.integers(0, 40))
        picture.paste((paper,) * 3, (left, top, left + width, top + height))
        for i, symbol in enumerate(thing.tag):
            glyph = _glyph(symbol)
            at = left + 2 + i * _ADVANCE + (_ADVANCE - glyph.width) // 2
            picture.paste((ink,) * 3, (at, top + (height - glyph.height) // 2), glyph)
    return np.array(picture)


JITTER = 3
"""Pixels by which an object's centre may leave the centre of its cell."""


def _background(random: np.random.Generator, photo: Image.Image) -> Image.Image:
    side = int(random.integers(min(photo.size) // 2, min(photo.size) + 1))
    left, top = (int(random.integers(0, edge - side + 1)) for edge in photo.size)
    part = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(part)[:, :: 1 if random.random() < 0.5 else -1]
    gain = random.uniform(0.6, 1.1) * random.uniform(0.85, 1.15, 3)
    return Image.fromarray(np.minimum(pixels * gain, 255).astype(np.uint8))


@cache
def _photos(split: str) -> tuple[Image.Image, ...]:
    try:
        from skimage import data
    except ImportError as error:
        raise ValueError(
            "the photographs behind the objects come with scikit-image: pip install 'vpt-kernels[demo]'"
        ) from error
    photos = []
    for name in PHOTOS[split]:
        with Image.open(Path(data.__file__).parent / name) as photo:
            photo = photo.convert("RGB")
        photo.thumbnail((640, 640), Image.Resampling.BOX)
        photos.append(photo)
    return tuple(photos)


@cache
def _mask(shape: str, size: int) -> Image.Image:
    edge = size * _OVERSAMPLING
    mask = Image.new("L", (edge, edge))
    draw, end = ImageDraw.Draw(mask), edge - 1
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        inset = edge // 16
        draw.rectangle((inset, inset, end - inset, end - inset), fill=255)
    elif shape == "triangle":
        draw.polygon([(edge // 2, 0), (end, end), (0, end)], fill=255)
    else:
        third = edge // 3
        draw.rectangle((third, 0, end - third, end), fill=255)
        draw.rectangle((0, third, end, end - third), fill=255)
    return mask.reduce(_OVERSAMPLING)


@cache
def _glyph(symbol: str) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    left, top, right, bottom = font.getbbox(symbol)
    glyph = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(glyph).text((-left, -top), symbol, fill=255, font=font)
    return glyph
