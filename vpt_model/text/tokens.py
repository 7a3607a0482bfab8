"""The perception-token vocabulary: look-up of ids, the region parser, forced looks and the tokenizer.

Source: arXiv 2502.17425 and its published code. A *region span* names cells of an 8x8 grid over the image,
`<|region_token_start|><|x_2|><|y_1|><|x_5|><|y_4|><|region_token_end|>`; an *action span* asks for the image to be
encoded again, `<|clip_action_start|><|clip_action|><|clip_action_end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from vpt_model.config import ENCODERS, require_integer, require_kind, require_type, shown
from vpt_model.text.files import byte_pairs, read_tokenizer

GRID = 8
"""Cells of the region grid along each side of the image."""

# Qwen2-VL's additional special tokens: each of them ends generation.
_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_REGION = (
    "<|region_token_start|>",
    "<|region_token_end|>",
    *(f"<|x_{i}|>" for i in range(GRID)),
    *(f"<|y_{i}|>" for i in range(GRID)),
)
_SPAN = re.compile(r"<\|region_token_start\|>((?:<\|[xy]_[0-7]\|>)+)<\|region_token_end\|>")
_CELL = re.compile(r"<\|([xy])_([0-7])\|>")
_FORCED_BOX = re.compile(r"x([0-7]),y([0-7]),x([0-7]),y([0-7])")


@dataclass(frozen=True)
class TokenIds:
    """Ids of the structural and perception tokens of one tokenizer; None where a variant lacks a token.

    `x` are the eight column tokens (left to right), `y` the eight row tokens (top to bottom).
    `system`, `user`, `assistant` are the ids of the role words, `newline` the single id of "\\n".
    `stop` ends generation. `kind` is the re-encoder: "clip", "detection", "seg" or None.
    """

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    endoftext: int
    newline: int
    system: int
    user: int
    assistant: int
    stop: frozenset[int]
    region_start: int | None = None
    region_end: int | None = None
    x: tuple[int, ...] = ()
    y: tuple[int, ...] = ()
    kind: str | None = None
    kind_pad: int | None = None
    action_start: int | None = None
    action: int | None = None
    action_end: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: tokenizers.Tokenizer, kind: str | None) -> TokenIds:
        """Look every token up in `tokenizer`; `kind` chooses the re-encoder's tokens.

        The stop ids are those of the published code (the additional special tokens, which include the re-encoder's
        pad) and `<|endoftext|>`. Raises ValueError if a token that every Qwen2-VL has is missing.
        """

        require_type("tokenizer", tokenizer, tokenizers.Tokenizer, "a tokenizers.Tokenizer")
        require_kind(kind)

        def required(token: str) -> int:
            if (found := tokenizer.token_to_id(token)) is None:
                raise ValueError(
                    f"the tokenizer has no token {token!r}: use the tokenizer of a Qwen2-VL or VPT checkpoint"
                )
            return found

        def word(text: str) -> int:
            found = tokenizer.encode(text, add_special_tokens=False).ids
            if len(found) != 1:
                raise ValueError(f"{text!r} must be one token, the tokenizer makes {found}: use a Qwen2-VL tokenizer")
            return found[0]

        def cells(axis: str) -> tuple[int, ...]:
            found = [tokenizer.token_to_id(f"<|{axis}_{i}|>") for i in range(GRID)]
            known = tuple(id for id in found if id is not None)
            return known if len(known) == GRID else ()

        pad = tokenizer.token_to_id(f"<|{kind}_image_pad|>")
        stop = {tokenizer.token_to_id(token) for token in _SPECIAL} | {pad, required("<|endoftext|>")}
        return cls(
            im_start=required("<|im_start|>"),
            im_end=required("<|im_end|>"),
            vision_start=required("<|vision_start|>"),
            vision_end=required("<|vision_end|>"),
            image_pad=required("<|image_pad|>"),
            endoftext=required("<|endoftext|>"),
            newline=word("\n"),
            system=word("system"),
            user=word("user"),
            assistant=word("assistant"),
            stop=frozenset(id for id in stop if id is not None),
            region_start=tokenizer.token_to_id("<|region_token_start|>"),
            region_end=tokenizer.token_to_id("<|region_token_end|>"),
            x=cells("x"),
            y=cells("y"),
            kind=kind,
            kind_pad=pad,
            action_start=tokenizer.token_to_id(f"<|{kind}_action_start|>"),
            action=tokenizer.token_to_id(f"<|{kind}_action|>"),
            action_end=tokenizer.token_to_id(f"<|{kind}_action_end|>"),
        )

    @property
    def action_span(self) -> tuple[int, int, int]:
        """The canonical answer that asks for re-encoding; ValueError if the variant has no such tokens."""
        if self.action_start is None or self.action is None or self.action_end is None:
            raise ValueError(
                f"the tokenizer has no action tokens for kind {self.kind!r}: use a VPT checkpoint of that kind"
            )
        return self.action_start, self.action, self.action_end

    def region_span(self, x_min: int, y_min: int, x_max: int, y_max: int) -> tuple[int, ...]:
        """Return the six ids of a region span; ValueError if the variant has no region tokens."""
        if self.region_start is None or self.region_end is None or not self.x or not self.y:
            raise ValueError("the tokenizer has no region tokens: use a VPT checkpoint (alignment variants lack them)")
        for name, cell in (("x_min", x_min), ("y_min", y_min), ("x_max", x_max), ("y_max", y_max)):
            require_integer(name, cell, 0, GRID - 1)
        cells = (self.x[x_min], self.y[y_min], self.x[x_max], self.y[y_max])
        return (self.region_start, *cells, self.region_end)


@dataclass(frozen=True)
class RegionSpan:
    """The grid columns and rows that one region span names; either may be empty, order and repetition are dropped."""

    columns: frozenset[int]
    rows: frozenset[int]


def parse_regions(text: str) -> list[RegionSpan]:
    """Return every region span of `text`, in order: a start, one or more column or row tokens in any order, an end."""
    spans = []
    for match in _SPAN.finditer(text):
        cells = _CELL.findall(match[1])
        spans.append(RegionSpan(*(frozenset(int(i) for axis, i in cells if axis == wanted) for wanted in "xy")))
    return spans


def parse_region_ids(tokens: Iterable[int], ids: TokenIds) -> list[RegionSpan]:
    """Do `parse_regions` on token ids."""
    names = {ids.region_start: _REGION[0], ids.region_end: _REGION[1]}
    names |= {token: f"<|x_{i}|>" for i, token in enumerate(ids.x)}
    names |= {token: f"<|y_{i}|>" for i, token in enumerate(ids.y)}
    return parse_regions("".join(names.get(token, " ") for token in tokens))


def crop_box(region: RegionSpan, width: int, height: int) -> tuple[int, int, int, int]:
    """Return pixel box (left, top, right, bottom), right and bottom exclusive, of a region of a width x height image.

    One cell of margin on every side, clipped at the border; cell edges are truncated to whole pixels.
    Raises ValueError if the region names no column or no row, or if the box holds no pixel.
    """
    if not region.columns or not region.rows:
        raise ValueError(
            f"the region names columns {sorted(region.columns)} and rows {sorted(region.rows)}; "
            f"it must name at least one of each"
        )
    left, right = max(min(region.columns) - 1, 0), min(max(region.columns) + 1, GRID - 1)
    top, bottom = max(min(region.rows) - 1, 0), min(max(region.rows) + 1, GRID - 1)
    cell_width, cell_height = width / GRID, height / GRID
    box = (
        int(left * cell_width),
        int(top * cell_height),
        int((right + 1) * cell_width),
        int((bottom + 1) * cell_height),
    )
    if box[0] == box[2] or box[1] == box[3]:
        raise ValueError(
            f"box {box} of a {width}x{height} image holds no pixel: use an image of at least {GRID}x{GRID}"
        )
    return box


def parse_look(spec: str, ids: TokenIds) -> list[int]:
    """Return the answer that a forced look stands for, as token ids.

    `"region:x2,y1,x5,y4"` is one region span (first and last column and row, 0..7) and the end of the turn, several
    boxes are joined by `+` (`"region:x2,y1,x5,y4+x0,y0,x3,y3"`); the name of the variant's re-encoder, `"clip"`,
    `"dino"` or `"sam"`, is its action span's first token, at which the answer is cut short. Raises ValueError for
    anything else.
    """
    require_type("look", spec, str, 'a string such as "region:x2,y1,x5,y4"')
    if ids.kind is not None and ENCODERS.get(spec) == ids.kind:
        return [ids.action_span[0]]
    name, _, boxes = spec.partition(":")
    if name != "region":
        own = next((repr(encoder) for encoder, kind in ENCODERS.items() if kind == ids.kind), "of which it has none")
        raise ValueError(f'look is {spec!r}; it must be "region:x2,y1,x5,y4" or this model\'s re-encoder, {own}')
    tokens: list[int] = []
    for box in boxes.split("+"):
        if (match := _FORCED_BOX.fullmatch(box.strip())) is None:
            raise ValueError(
                f"box {box!r} of look {spec!r} is not of the form x2,y1,x5,y4 (first column, first row, last column, "
                f"last row, each 0..{GRID - 1}); join several boxes by +"
            )
        tokens += ids.region_span(*map(int, match.groups()))
    return [*tokens, ids.im_end]


class Tokenizer:
    """Text to ids and back, with the `TokenIds` of the vocabulary in `ids`."""

    def __init__(self, backend: tokenizers.Tokenizer, kind: str | None) -> None:
        self._backend = backend
        self.ids = TokenIds.from_tokenizer(backend, kind)

    @classmethod
    def from_folder(cls, folder: str | Path, kind: str | None) -> Tokenizer:
        """Return the tokenizer of a checkpoint folder, in `tokenizer.json` or the files of older generations.

        Raises ValueError if a file is missing, unreadable or contradicts another.
        """
        require_type("folder", folder, (str, PathLike), "a path")
        return cls(read_tokenizer(Path(folder)), kind)

    @classmethod
    def byte_level(cls, vocab_size: int, kind: str | None, words: Sequence[str] = ()) -> Tokenizer:
        """Return a tokenizer for random weights: one token per byte, and the special and perception tokens.

        From 151,679 tokens on, all of them, the role words and the words of the system prompt have the ids that they
        have in Qwen2-VL and its VPT variants; below, they follow the 256 bytes, and behind them come `words`, each with
        the space before it if it has one. Raises ValueError below 297 tokens, or if the words do not fit.
        """
        vocab_size = require_integer("vocab_size", vocab_size, 1, 1 << 31)
        require_kind(kind)
        if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) and _is_text(word) for word in words):
            raise TypeError(f"words is {shown(words)}; it must be a list of strings")
        symbols = _byte_symbols()
        pad = [f"<|{kind}_image_pad|>"] if kind else []
        action = [f"<|{kind}_action_start|>", f"<|{kind}_action|>", f"<|{kind}_action_end|>"] if kind else []
        if vocab_size >= 151_679:
            vocabulary = _numbered(symbols.values(), 0) | {"system": 8948, "user": 872, "assistant": 77091}
            vocabulary |= {"You": 2610, "Ġare": 525, "Ġa": 264, "Ġhelpful": 10950, "Ġassistant": 17847}
            special = _numbered(["<|endoftext|>", *_SPECIAL, *pad], 151_643)
            plain = _numbered([*_REGION, *action], 151_658)
        elif vocab_size >= 297 + len(words):
            first = {None: 264, "detection": 264, "clip": 268, "seg": 272}[kind]
            spelled = ["".join(symbols[byte] for byte in word.encode()) for word in words]
            vocabulary = {symbols[byte]: byte for byte in range(256)}
            vocabulary |= _numbered(["system", "user", "assistant", *spelled], 294)
            special = _numbered([*_SPECIAL[:2], *_SPECIAL[8:], "<|endoftext|>"], 256) | _numbered(pad, first + 3)
            plain = _numbered(action, first) | _numbered(_REGION, 276)
        else:
            least = f"bytes, special and perception tokens and {len(words)} words need at least {297 + len(words)}"
            raise ValueError(f"vocab_size is {vocab_size}; {least}")
        # Without merges, whole words of the vocabulary are found only because they are looked up first.
        backend = byte_pairs(models.BPE(vocab=vocabulary | special | plain, merges=[], ignore_merges=True))
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
        return cls(backend, kind)

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json` from which `from_folder` makes this tokenizer."""
        return self._backend.to_str()

    def check_vocabulary(self, rows: int, declared: Mapping[str, Any]) -> None:
        """Raise ValueError unless this is the vocabulary of a checkpoint.

        rows: of the embedding. declared: the `config.json`; the token ids it names, where they are not null, must be
        these. A variant must have its re-encoder's pad; of the region and action tokens it has all or, if it was only
        aligned, none.
        """
        rows = require_integer("rows", rows, 0)
        require_type("declared", declared, Mapping, "the fields of a config.json")
        largest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= rows:
            raise ValueError(
                f"vocabulary mismatch: the tokenizer has ids up to {largest}, the embedding {rows} rows; use the "
                "tokenizer that was saved with the weights"
            )
        ids, kind = self.ids, self.ids.kind
        if kind is not None:
            perception = [*_REGION, *(f"<|{kind}_action{part}|>" for part in ("_start", "", "_end"))]
            missing = [token for token in perception if self._backend.token_to_id(token) is None]
            if ids.kind_pad is None or 0 < len(missing) < len(perception):
                missing = [f"<|{kind}_image_pad|>"] * (ids.kind_pad is None) + missing
                raise ValueError(
                    f"vocabulary mismatch: the tokenizer lacks {', '.join(missing)}, which the weights of kind "
                    f"{kind!r} were trained with; use the tokenizer that was saved with them"
                )
        expected = {
            "vision_start_token_id": ids.vision_start,
            "vision_end_token_id": ids.vision_end,
            "image_token_id": ids.image_pad,
            "para_start_id": ids.im_start,
            "para_end_id": ids.im_end,
            f"{kind}_image_token_id": ids.kind_pad,
            f"{kind}_action_start_id": ids.action_start,
            f"{kind}_action_id": ids.action,
        }
        for name, found in expected.items():
            if declared.get(name) not in (None, found):
                raise ValueError(
                    f"vocabulary mismatch: config.json has {name} {declared[name]!r}, the tokenizer says {found}; use "
                    "the tokenizer that was saved with the weights"
                )

    @property
    def is_aligned_only(self) -> bool:
        """Whether this is a variant's intermediate stage, which has no region and action tokens."""
        return self.ids.kind is not None and self.ids.region_start is None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; names of special and perception tokens in it become those tokens.

        Raises TypeError for anything but a string, ValueError for one that is no text (lone surrogates).
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {shown(text)}; it must be a string")
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            raise ValueError(
                f"the text is not valid Unicode: character {at} is a lone surrogate; decode its bytes as UTF-8, or "
                "remove it"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Return text of `tokens` without special tokens; perception tokens stay, an id without a token n reads ⟨n⟩.

        Raises TypeError for ids that are not integers, ValueError for ids that do not fit into 32 bits.
        """
        if isinstance(tokens, str) or not hasattr(tokens, "__len__") or getattr(tokens, "ndim", 1) != 1:
            raise TypeError(f"tokens is {shown(tokens)}; it must be a list of token ids")
        tokens = [require_integer("a token id", token, 0, (1 << 32) - 1) for token in tokens]
        pieces = groupby(tokens, key=lambda token: self._backend.id_to_token(token) is not None)
        return "".join(
            self._backend.decode(list(run)) if known else "".join(f"⟨{token}⟩" for token in run)
            for known, run in pieces
        )


def _is_text(word: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in word)


def _numbered(tokens: Iterable[str], first: int) -> dict[str, int]:
    return {token: first + i for i, token in enumerate(tokens)}


def _byte_symbols() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level BPE, in the order of GPT-2's and Qwen's
    vocabulary.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
