"""What is measured, as data. `quick` rows make up `make bench`; the others join in `make bench-full`.

Rows with a `sweep` show how the cost grows along it: the field of that name runs while all others stay.

Images and crops are those of Qwen2-VL and of Visual Perception Tokens: photos, documents of 1700×2200, photos of 12
megapixels; looks of at most 512 pixels a side give 54 to 324 tokens. "2b" and "7b" are the language models' widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Lm:
    """The widths of a language model: hidden size, query and key/value heads, head dimension, those of its MLP."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


LMS = {"2b": Lm(1536, 12, 2, 128, 8960), "7b": Lm(3584, 28, 4, 128, 18944)}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one row measures. quick: in `make bench`, too. sweep: the field along which its cost is drawn, if any."""

    quick: bool = True
    sweep: str = ""


@dataclass(frozen=True)
class Roi(Workload):
    """`regions` boxes of one image; each result has at most `longest_edge` pixels a side, or `max_pixels` in all.

    new_geometry: every call crops boxes never seen before, which is what a second look does.
    """

    width: int
    height: int
    regions: int
    dtype: str
    longest_edge: int | None = None
    max_pixels: int | None = None
    new_geometry: bool = True

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def shape(self) -> str:
        limit = f"{self.longest_edge} px" if self.longest_edge else f"{self.max_pixels / 1e6:.1f} Mpx"
        again = "" if self.new_geometry else ", same boxes"
        return f"{self.width}×{self.height}, {self.regions} region{'s' * (self.regions > 1)}, ≤ {limit}{again}"


@dataclass(frozen=True)
class Control(Workload):
    """`images` of `tokens` features each under one control row each; form as in `fold_projector`."""

    form: str
    images: int
    tokens: int
    lm: str
    dtype: str

    @property
    def shape(self) -> str:
        return f"{self.form}, {self.images}×{self.tokens} tokens, {self.lm}"


@dataclass(frozen=True)
class Append(Workload):
    """`tokens` appended to a cache of `capacity` rows, page_size 0: contiguous."""

    tokens: int
    lm: str
    dtype: str
    capacity: int = 8192
    page_size: int = 0
    in_place: bool = False
    normed: ClassVar[bool] = False

    @property
    def op(self) -> str:
        return "append_visual_kv_" if self.in_place else "append_visual_kv"

    @property
    def shape(self) -> str:
        pages = f", pages of {self.page_size}" if self.page_size else ""
        return f"{self.tokens} tokens, {self.lm}{pages}{', q in place' if self.in_place else ''}"


@dataclass(frozen=True)
class NormedAppend(Append):
    """The heads of q and k are normalised before they are rotated."""

    normed: ClassVar[bool] = True

    @property
    def shape(self) -> str:
        return f"{super().shape}, with norms of heads"


@dataclass(frozen=True)
class Product(Workload):
    """`rows` of float32 times the largest weight of a layer, kept in the precision `weights`."""

    rows: int
    lm: str
    weights: str
    op: ClassVar[str] = "packed_linear"
    dtype: ClassVar[str] = "float32"

    @property
    def features(self) -> int:
        return LMS[self.lm].hidden

    @property
    def columns(self) -> int:
        return LMS[self.lm].intermediate

    @property
    def shape(self) -> str:
        return f"{self.rows} row{'s' * (self.rows > 1)} × {self.features} → {self.columns}, {self.weights} weights"


@dataclass(frozen=True)
class SecondLook(Workload):
    """A forced look of `preset` (random weights), measured from the trigger token to the first answer token.

    history: tokens of conversation before the question, which the cache holds.
    """

    preset: str
    look: str
    history: int = 0
    op: ClassVar[str] = "second look"
    weights: str = "float32"

    @property
    def dtype(self) -> str:
        return self.weights

    @property
    def shape(self) -> str:
        return f"{self.look}, {self.preset}{f', after {self.history} tokens' if self.history else ''}"


@dataclass(frozen=True)
class HostCall:
    """The smallest call of a function, of which only the host's time counts."""

    what: str
    dtype: ClassVar[str] = "–"

    @property
    def shape(self) -> str:
        return f"host time, {self.what}"


@dataclass(frozen=True)
class DropInImage(Workload):
    """One image to the patch embeddings of Qwen2-VL's tower, a new crop each call, at most `max_pixels` resized."""

    width: int
    height: int
    max_pixels: int
    dtype: ClassVar[str] = "float32"

    @property
    def shape(self) -> str:
        return f"image to patch embeddings, {self.width}×{self.height}, ≤ {self.max_pixels / 1e6:.1f} Mpx"


@dataclass(frozen=True)
class DropInDecode(Workload):
    """`tokens` decoded by transformers' model of `preset` behind `context` ones in a "dynamic" or "static" cache."""

    preset: str
    cache: str
    context: int
    tokens: int = 4
    dtype: ClassVar[str] = "float32"

    @property
    def shape(self) -> str:
        label = ", Python overhead" if self.preset == "tiny" else ""
        return f"{self.tokens} tokens, {self.preset}{label}, {self.cache} cache of {self.context}"


@dataclass(frozen=True)
class Turn(Workload):
    """A further turn with a model of `preset`: "question", "image" (a new photo and a question) or "zoom" (a region).

    behind: tokens of text that the conversation holds beside its first photo. The time up to the first answer token.
    """

    preset: str
    turn: str
    behind: int
    dtype: ClassVar[str] = "float32"

    @property
    def shape(self) -> str:
        return f"{self.turn}, behind {self.behind} tokens, {self.preset}"


class LiveTurn(Turn):
    """A turn with transformers' model."""

    op: ClassVar[str] = "live turn"


class ChatTurn(Turn):
    """A turn of a chat with the engine, whose re-encoder is clip."""

    op: ClassVar[str] = "chat turn"


@dataclass(frozen=True)
class Decode(Workload):
    """`tokens` of an answer about a photo, one by one, of `preset` (random weights), in each of `batch` rows.

    The time of one token of every row.
    """

    preset: str
    batch: int = 1
    tokens: int = 8
    op: ClassVar[str] = "decode"
    weights: str = "float32"

    @property
    def dtype(self) -> str:
        return self.weights

    @property
    def shape(self) -> str:
        return f"one token{f' of each of {self.batch} rows' if self.batch > 1 else ''}, {self.preset}"


@dataclass(frozen=True)
class Row:
    """A row's identity: an operator on a workload. Results know it by its `name`."""

    op: str
    workload: Any

    @property
    def name(self) -> str:
        return f"{self.op} | {self.workload.shape} | {self.workload.dtype}"


PHOTO, DOCUMENT, LARGE = (512, 384), (1700, 2200), (4000, 3000)
MEGAPIXEL = 14 * 14 * 4 * 1280

ROI = (
    *(Roi(*PHOTO, 1, dtype, max_pixels=12_845_056) for dtype in ("float32", "bfloat16")),
    *(Roi(*LARGE, 1, dtype, max_pixels=MEGAPIXEL, quick=dtype == "float32") for dtype in ("float32", "bfloat16")),
    Roi(*PHOTO, 1, "float32", max_pixels=12_845_056, new_geometry=False, quick=False),
    *(
        Roi(*DOCUMENT, n, dtype, longest_edge=512, quick=n <= 4, sweep="regions")
        for dtype in ("float32", "bfloat16")
        for n in (1, 4, 16, 64)
    ),
    *(Roi(*LARGE, n, dtype, longest_edge=512, quick=False) for dtype in ("float32", "bfloat16") for n in (16, 64)),
    *(
        Roi(side, side, 1, "float32", max_pixels=MEGAPIXEL, quick=False, sweep="pixels")
        for side in (112, 224, 448, 896, 1792, 3584)
    ),
)
PATCHES = (
    Roi(*PHOTO, 1, "uint8", max_pixels=12_845_056),
    Roi(*LARGE, 1, "uint8", max_pixels=MEGAPIXEL),
    *(Roi(*DOCUMENT, n, "uint8", longest_edge=512) for n in (1, 4)),
    *(Roi(*LARGE, n, "uint8", longest_edge=512, quick=False) for n in (16, 64)),
)
CONTROL = (
    *(Control("identity", 1, 252, lm, "float32") for lm in LMS),
    Control("linear", 1, 256, "2b", "float32", sweep="images"),
    Control("conv", 1, 256, "2b", "float32"),
    *(Control("linear", n, 256, "2b", "float32", quick=False, sweep="images") for n in (2, 4, 8)),
    *(Control(form, 1, 252 if form == "identity" else 256, "2b", "bfloat16") for form in ("identity", "linear")),
    *(
        Control(form, images, 252 if form == "identity" else 256, lm, dtype, quick=False)
        for form in ("identity", "linear", "conv")
        for images in (1, 16)
        for lm in LMS
        for dtype in ("float32", "bfloat16")
        if (images == 16 or lm == "7b")
        and (form, images, lm, dtype) not in (("linear", 16, "2b", "float32"), ("identity", 1, "7b", "float32"))
    ),
    Control("linear", 16, 256, "2b", "float32", quick=False, sweep="images"),
)
APPEND = (
    *(Append(n, "2b", "float32", sweep="tokens") for n in (1, 54, 270, 4096)),
    *(Append(n, "2b", "float32", capacity=65_536, quick=False, sweep="tokens") for n in (8, 1024, 16_384, 65_536)),
    Append(270, "2b", "float32", in_place=True),
    Append(4096, "2b", "float32", in_place=True),
    Append(270, "2b", "bfloat16"),
    Append(4096, "2b", "bfloat16"),
    Append(270, "2b", "bfloat16", page_size=16),
    *(NormedAppend(n, "2b", dtype) for n in (1, 270) for dtype in ("float32", "bfloat16")),
    Append(270, "7b", "bfloat16"),
    *(Append(n, lm, "bfloat16", capacity=65_536, quick=False) for n in (16_384, 65_536) for lm in LMS),
    *(Append(n, "7b", "float32", capacity=32_768, quick=False) for n in (1, 4096)),
)
PRODUCTS = {
    "cpu": (
        *(Product(rows, "2b", kept) for kept in ("float32", "bfloat16", "int8", "int4") for rows in (1, 270)),
        Product(270, "2b", "w8a8"),
        *(Product(rows, "2b", "float16", quick=False) for rows in (1, 270)),
        *(
            Product(rows, "2b", kept, quick=False)
            for kept in ("float32", "bfloat16", "float16", "int8", "int4", "w8a8")
            for rows in (8, 128, 1020)
        ),
        *(
            Product(rows, "7b", kept, quick=False)
            for kept in ("float32", "bfloat16", "int8", "int4")
            for rows in (1, 270)
        ),
    ),
    "cuda": (),
}
REGIONS = ("region:x3,y3,x3,y3", "region:x2,y1,x5,y4")
"""Crops of 54 to 91 and of 324 tokens."""
ENGINE = {
    "cpu": (
        *(SecondLook("2b-slice", look, quick=look != REGIONS[1], sweep="history") for look in (*REGIONS, "clip")),
        Decode("2b-slice", sweep="batch"),
        *(Decode("2b-slice", batch, quick=False, sweep="batch") for batch in (2, 4, 8)),
        *(
            SecondLook("2b-slice", look, history, quick=False, sweep="history")
            for look in (*REGIONS, "clip")
            for history in (1024, 4096)
        ),
        *(SecondLook("2b-slice", look, quick=False) for look in ("dino", "sam")),
    ),
    "cuda": (
        Decode("2b"),
        *(SecondLook("2b", look) for look in ("clip", *REGIONS)),
        *(SecondLook("2b", look, quick=False) for look in ("dino", "sam")),
    ),
}
DROP_IN_IMAGES = (DropInImage(*PHOTO, 12_845_056), DropInImage(*LARGE, MEGAPIXEL, quick=False))
LIVE_TURNS = tuple(
    LiveTurn("2b-slice", turn, behind, quick=False, sweep="behind")
    for turn in ("question", "image", "zoom")
    for behind in (0, 256, 1024, 4096)
)
CHAT_TURNS = tuple(
    ChatTurn("2b-slice", turn, behind, quick=False, sweep="behind")
    for turn in ("question", "image", "zoom")
    for behind in (0, 256, 1024, 4096)
)
DROP_IN_DECODE = tuple(
    DropInDecode(preset, cache, context, quick=False)
    for preset, context in (("tiny", 256), ("2b-slice", 300), ("2b-slice", 4096))
    for cache in ("dynamic", "static")
)
