"""An alias of `vpt_model.text.tokens` that warns; it goes with version 0.3."""

import warnings

from vpt_model.text.tokens import (
    GRID,
    RegionSpan,
    TokenIds,
    Tokenizer,
    crop_box,
    parse_look,
    parse_region_ids,
    parse_regions,
)

__all__ = [
    "GRID",
    "RegionSpan",
    "TokenIds",
    "Tokenizer",
    "crop_box",
    "parse_look",
    "parse_region_ids",
    "parse_regions",
]
warnings.warn(
    "vpt_model.tokens has moved: use `from vpt_model import Tokenizer, TokenIds`, the rest is in vpt_model.text.tokens",
    DeprecationWarning,
    stacklevel=2,
)
