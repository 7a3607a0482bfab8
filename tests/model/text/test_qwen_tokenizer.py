"""Qwen's real vocabulary with the perception tokens of every variant: ids, headers, frames and spans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.checkpoints import VARIANTS
from tests.model.qwen import write_tokenizer
from vpt_model.text.prompt import (
    REENCODE_TRIGGER,
    REGION_TRIGGER,
    PromptFormat,
    action_round,
    first_round,
    region_round,
)
from vpt_model.text.tokens import TokenIds, Tokenizer, parse_look, parse_region_ids, parse_regions

KINDS = (None, "clip", "detection", "seg")
QUESTIONS = (
    "What is written on the sign?",
    "Was steht auf dem Schild?\nAntworte mit einem Wort.",
    "图片里有什么? 😀",
    "  2024-05-01: is it 3.14 or 42%?  ",
    "It's the café's naïve façade, isn't it",
    "",
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str | None, bool], Tokenizer]:
    made = {}
    for kind, aligned in [(kind, False) for kind in KINDS] + [("detection", True), ("seg", True)]:
        folder = tmp_path_factory.mktemp(f"{kind}-{aligned}")
        write_tokenizer(folder, kind, aligned)
        made[kind, aligned] = Tokenizer.from_folder(folder, kind)
    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_of_every_variant(tokenizers, name):
    kind, aligned = VARIANTS[name].kind, VARIANTS[name].aligned
    tokenizer = tokenizers[kind, aligned]
    perception = (
        {}
        if aligned
        else {
            "region_start": 151658,
            "region_end": 151659,
            "x": tuple(range(151660, 151668)),
            "y": tuple(range(151668, 151676)),
            "action_start": 151676,
            "action": 151677,
            "action_end": 151678,
        }
    )
    assert tokenizer.ids == TokenIds(
        im_start=151644,
        im_end=151645,
        vision_start=151652,
        vision_end=151653,
        image_pad=151655,
        endoftext=151643,
        newline=198,
        system=8948,
        user=872,
        assistant=77091,
        # Every additional special token ends generation, and so does the pad; perception tokens do not.
        stop=frozenset(range(151643, 151658)),
        kind=kind,
        kind_pad=151657,
        **perception,
    )
    assert tokenizer._backend.get_vocab_size() == (151658 if aligned else 151679)
    rows = 152064 if "7b" in name else 151936
    tokenizer.check_vocabulary(rows, {f"{kind}_image_token_id": 151657})
    with pytest.raises(ValueError, match="ids up to 1516[57][78]"):
        tokenizer.check_vocabulary(151657, {})
    assert tokenizer.is_aligned_only == aligned


def test_ids_of_the_plain_model(tokenizers):
    ids = tokenizers[None, False].ids
    assert ids.stop == frozenset(range(151643, 151657)) and ids.kind_pad is ids.region_start is ids.action is None


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_of_random_weights_has_the_same_ids(tokenizers, kind):
    made = Tokenizer.byte_level(151936, kind)
    if kind is not None:
        assert made.ids == tokenizers[kind, False].ids
    assert made.encode(PromptFormat().system) == tokenizers[kind, False].encode(PromptFormat().system)


@pytest.mark.parametrize("name", VARIANTS)
def test_system_header(tokenizers, name):
    tokenizer = tokenizers[VARIANTS[name].kind, VARIANTS[name].aligned]
    header = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert tokenizer.encode(text) == [*header, 151644, 872, 198]
    prompt = first_round(tokenizer.ids, tokenizer.encode(PromptFormat().system), tokenizer.encode("Hi"), None)
    assert prompt[:11] == header and prompt[-3:] == [151644, 77091, 198]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("trigger", [None, REGION_TRIGGER, REENCODE_TRIGGER])
def test_prompts_are_the_whole_text_encoded_at_once(tokenizers, question, trigger):
    """The published code encodes turns apart; joints are at special tokens, so both are the same ids."""
    tokenizer, layout = tokenizers["clip", False], PromptFormat(trigger=trigger)
    user = layout.user_text(question, image=True)
    image = "<|vision_start|>" + "<|image_pad|>" * 5 + "<|vision_end|>"
    text = f"<|im_start|>system\n{layout.system}<|im_end|>\n<|im_start|>user\n{image}{user}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    found = first_round(tokenizer.ids, tokenizer.encode(layout.system), tokenizer.encode(user), 5)
    assert found == tokenizer.encode(text)
    assert found.count(151655) == 5
    assert tokenizer.decode(tokenizer.encode(user)) == user


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("count", [4, 256])
def test_frame_of_a_re_encoded_image(tokenizers, kind, count):
    """14 tokens around the pads, from the action token to the assistant header."""
    tokenizer = tokenizers[kind, False]
    found = action_round(tokenizer.ids, count)
    pads = f"<|{kind}_image_pad|>" * count
    text = f"<|{kind}_action|><|{kind}_action_end|><|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
    assert found == tokenizer.encode(f"{text}<|im_end|>\n<|im_start|>assistant\n")
    assert len(found) == count + 14 and found.count(151657) == count
    assert found[:7] == [151677, 151678, 151645, 198, 151644, 872, 198]


@pytest.mark.parametrize("counts", [(54,), (4, 91), (4, 6, 8, 10)])
def test_frame_of_regions(tokenizers, counts):
    """13 tokens around the pads of one region: the span's end, which is not fed yet, and 12; more regions are named."""
    tokenizer = tokenizers["clip", False]
    found = [tokenizer.ids.region_end, *region_round(tokenizer.ids, counts, tokenizer.encode)]
    images = ["<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts]
    if len(counts) > 1:
        images = [f"Region {i}: {image}\n" for i, image in enumerate(images)]
    text = f"<|region_token_end|><|im_end|>\n<|im_start|>user\n{''.join(images)}<|im_end|>\n<|im_start|>assistant\n"
    assert found == tokenizer.encode(text)
    if len(counts) == 1:
        assert len(found) == counts[0] + 13


@pytest.mark.parametrize("kind", KINDS[1:])
def test_spans(tokenizers, kind):
    tokenizer = tokenizers[kind, False]
    text = "<|region_token_start|><|x_0|><|y_3|><|x_6|><|y_4|><|region_token_end|>"
    span = [151658, 151660, 151671, 151666, 151672, 151659]
    assert tokenizer.encode(text) == span == list(tokenizer.ids.region_span(0, 3, 6, 4))
    assert parse_look("region:x0,y3,x6,y4", tokenizer.ids) == [*span, 151645]
    assert parse_region_ids(span, tokenizer.ids) == parse_regions(text)
    # Added as plain tokens, they survive decoding without special tokens.
    assert tokenizer.decode([*span, 151645, 151657]) == text
    action = f"<|{kind}_action_start|><|{kind}_action|><|{kind}_action_end|>"
    assert tokenizer.encode(action) == [151676, 151677, 151678] == list(tokenizer.ids.action_span)
    assert tokenizer.decode([151676, 151677, 151678]) == action


def test_aligned_variants_have_no_spans(tokenizers):
    for kind in ("detection", "seg"):
        ids = tokenizers[kind, True].ids
        with pytest.raises(ValueError, match="no action tokens"):
            ids.action_span  # noqa: B018
        with pytest.raises(ValueError, match="alignment variants lack them"):
            ids.region_span(0, 0, 1, 1)


def test_known_encodings(tokenizers):
    """Ids that the tokenizer of the released models gives."""
    tokenizer = tokenizers[None, False]
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("Describe this image.") == [74785, 419, 2168, 13]
    assert len(tokenizer.encode("Now answer the question.\n")) == 5
    assert tokenizer.encode("\n\n") == [271] and tokenizer.encode("1234") == [16, 17, 18, 19]


def test_a_tokenizer_without_perception_tokens_is_refused(tmp_path: Path):
    write_tokenizer(tmp_path, None)
    with pytest.raises(ValueError, match=r"lacks <\|clip_image_pad\|>, <\|region_token_start\|>"):
        Tokenizer.from_folder(tmp_path, "clip").check_vocabulary(151936, {})
