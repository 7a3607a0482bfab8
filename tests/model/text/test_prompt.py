from __future__ import annotations

import pytest

from vpt_model.text.prompt import REGION_TRIGGER, PromptFormat, action_round, first_round, region_round
from vpt_model.text.tokens import Tokenizer

TOKENIZER = Tokenizer.byte_level(151_936, "clip")
IDS = TOKENIZER.ids
PLAIN = "You are a helpful assistant."


def text_of(tokens: list[int]) -> str:
    """The tokens as text with special tokens, one pad for a run."""
    backend = TOKENIZER._backend
    text = backend.decode(tokens, skip_special_tokens=False)
    for pad in ("<|image_pad|>", "<|clip_image_pad|>"):
        while pad * 2 in text:
            text = text.replace(pad * 2, pad)
    return text


def first(question: str, image_tokens: int | None, **texts: str | None) -> list[int]:
    form = PromptFormat(**texts)
    user = TOKENIZER.encode(form.user_text(question, image_tokens is not None))
    return first_round(IDS, TOKENIZER.encode(form.system), user, image_tokens)


HEAD = f"<|im_start|>system\n{PLAIN}<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    "texts, middle",
    [
        ({}, f"{PICTURE}\nWhat is it?"),
        ({"trigger": REGION_TRIGGER}, f"{PICTURE}\nWhat is it?\n{REGION_TRIGGER}"),
        ({"trigger": "Look.", "trigger_separator": " ", "image_separator": ""}, f"{PICTURE}What is it? Look."),
    ],
)
def test_first_round(texts, middle):
    tokens = first("What is it?", 252, **texts)
    assert text_of(tokens) == HEAD + middle + TAIL
    assert tokens == TOKENIZER.encode(HEAD + middle.replace("<|image_pad|>", "<|image_pad|>" * 252) + TAIL)


def test_first_round_without_an_image():
    assert text_of(first("Hello", None)) == HEAD + "Hello" + TAIL


def test_length_of_the_first_round_in_tokens_of_the_question():
    # 11 of the system turn, 3 and 3 of the headers, 2 around the image, 2 behind the question.
    assert len(first("", 54, image_separator="")) == 54 + 21


def test_one_region_adds_twelve_tokens():
    tokens = region_round(IDS, [91], TOKENIZER.encode)
    assert len(tokens) == 91 + 12
    assert text_of(tokens) == "<|im_end|>\n<|im_start|>user\n" + PICTURE + TAIL


def test_several_regions_are_numbered():
    tokens = region_round(IDS, [4, 6, 9], TOKENIZER.encode)
    whole = "<|im_end|>\n<|im_start|>user\n"
    whole += "".join(
        f"Region {i}: <|vision_start|>{'<|image_pad|>' * n}<|vision_end|>\n" for i, n in enumerate([4, 6, 9])
    )
    assert tokens == TOKENIZER.encode(whole + TAIL)


def test_an_action_adds_fourteen_tokens():
    tokens = action_round(IDS, 252)
    assert len(tokens) == 252 + 14
    assert text_of(tokens) == (
        "<|clip_action|><|clip_action_end|><|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|clip_image_pad|><|vision_end|>" + TAIL
    )
    assert tokens.count(IDS.kind_pad) == 252 and IDS.image_pad not in tokens
