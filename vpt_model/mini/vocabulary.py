"""vpt-mini's tokenizer: bytes, the special and perception tokens, and the words of its questions and answers."""

from __future__ import annotations

from functools import cache

from vpt_model.config import PRESETS
from vpt_model.mini.scenes import COLOURS, SHAPES
from vpt_model.text.prompt import REENCODE_TRIGGER, REGION_TRIGGER
from vpt_model.text.tokens import Tokenizer

DIRECT_TRIGGER = "Answer the question using a single word or phrase."
LOOK_TRIGGERS = {"region": REGION_TRIGGER, "clip": REENCODE_TRIGGER, None: None}
"""The sentence that asks for each path, as in the released models' data."""

_SENTENCES = (
    "You are a helpful assistant. What is on the tag of the tags of the and the? What colour is the? What shape is "
    "the object? How many objects are?"
)


@cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer that vpt-mini is trained with, and whose file is shipped with its weights."""
    words = dict.fromkeys([*COLOURS, *SHAPES])
    for sentence in (_SENTENCES, DIRECT_TRIGGER, REGION_TRIGGER, REENCODE_TRIGGER):
        for number, word in enumerate(sentence.replace(".", "").replace(",", "").replace("?", "").split()):
            words[f" {word}" if number else word] = None
    for word in (*COLOURS, *SHAPES, "What", "How", "Region"):
        words[word] = words[f" {word}"] = None
    config = PRESETS["mini"]
    return Tokenizer.byte_level(config.vocab_size, config.kind, list(words))
