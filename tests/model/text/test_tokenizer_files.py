"""One tokenizer from the files of every generation, and transformers' ids from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.model.qwen import QWEN2_VL, base_tokenizer, write_tokenizer
from vpt_model.text.tokens import Tokenizer

QUESTION = "What is written on the second line of the sign at the left? <|x_3|> Größe: 3.14, 图片 😀"
LATER = ["<|clip_image_pad|>", "<|region_token_start|>", "<|x_3|>"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the newest form, with the real vocabulary."""
    folder = tmp_path_factory.mktemp("whole")
    write_tokenizer(folder, "clip")
    return folder


@pytest.fixture(scope="module")
def content(whole: Path) -> dict:
    return json.loads((whole / "tokenizer.json").read_text(encoding="utf-8"))


def write(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        stem, suffix = name.rsplit("_", 1)
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def added(content: dict) -> dict[str, int]:
    return {token["content"]: token["id"] for token in content["added_tokens"]}


def decoder(content: dict) -> dict[str, dict]:
    tokens = [dict(token) for token in content["added_tokens"]]
    return {str(token.pop("id")): token for token in tokens}


def merges(content: dict) -> str:
    pairs = content["model"]["merges"]
    return "#version: 0.2\n" + "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in pairs) + "\n"


def special(content: dict) -> dict:
    return {"additional_special_tokens": [token["content"] for token in content["added_tokens"] if token["special"]]}


FORMS = ["vocab and added_tokens", "vocab and added_tokens_decoder", "vocab and both"]
FORMS += ["tokenizer.json and added_tokens", "tokenizer.json and added_tokens_decoder", "tokenizer.json and names"]


def in_form(folder: Path, content: dict, form: str) -> Path:
    bare = {**content, "added_tokens": [token for token in content["added_tokens"] if token["content"] in QWEN2_VL]}
    base = {"tokenizer_json": bare}
    if form.startswith("vocab"):
        base = {"vocab_json": content["model"]["vocab"], "merges_txt": merges(content)}
    if form.endswith(("added_tokens", "both")):
        base |= {"added_tokens_json": added(content), "special_tokens_map_json": special(content)}
    if form.endswith(("decoder", "both")):
        base |= {"tokenizer_config_json": {"added_tokens_decoder": decoder(content)}}
    if form.endswith("names"):  # the first of them only: the others are not special
        base |= {"tokenizer_config_json": {"extra_special_tokens": LATER[:1]}}
    return write(folder, **base)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_ids_of_the_newest(tmp_path: Path, whole: Path, content: dict, form: str) -> None:
    expected = Tokenizer.from_folder(whole, "clip")
    found = Tokenizer.from_folder(in_form(tmp_path, content, form), "clip")
    if form.endswith("names"):
        assert found.ids.kind_pad == expected.ids.kind_pad and found.ids.region_start is None
        return
    assert found.ids == expected.ids
    for text in (QUESTION, "<|im_start|>user\n<|clip_image_pad|><|region_token_start|>", "  two  spaces\r\n", ""):
        ids = expected.encode(text)
        assert found.encode(text) == ids and found.decode(ids) == expected.decode(ids)


@pytest.mark.parametrize("beside", ["added_tokens", "added_tokens_decoder"])
def test_tokens_of_the_vocabulary_that_a_file_beside_it_adds_are_whole(tmp_path: Path, beside: str) -> None:
    """The vocabulary has them and `tokenizer.json` adds none: transformers adds them, else they are spelt in pieces."""
    expected = Tokenizer.byte_level(320, "clip")
    content = json.loads(expected.to_json())
    files = {"tokenizer_json": content | {"added_tokens": []}}
    if beside == "added_tokens":
        files |= {"added_tokens_json": added(content), "special_tokens_map_json": special(content)}
    else:
        files |= {"tokenizer_config_json": {"added_tokens_decoder": decoder(content)}}
    found, text = Tokenizer.from_folder(write(tmp_path, **files), "clip"), "<|im_start|>user\n<|x_2|><|im_end|>"
    assert len(expected.encode(text)) == 5 and found.encode(text) == expected.encode(text)
    assert found.decode(found.encode(text)) == expected.decode(expected.encode(text))
    if beside == "added_tokens_decoder":
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"),
            added_tokens_decoder={int(n): AddedToken(**token) for n, token in decoder(content).items()},
        )
        assert theirs(text)["input_ids"] == found.encode(text)


@pytest.mark.parametrize("form", ["vocab and added_tokens", "vocab and added_tokens_decoder"])
def test_transformers_reads_the_same_ids_from_the_same_files(tmp_path: Path, content: dict, form: str) -> None:
    folder = in_form(tmp_path, content, form)
    config = json.loads((folder / "tokenizer_config.json").read_text()) if form.endswith("decoder") else {}
    write(folder, tokenizer_config_json=config | {"tokenizer_class": "Qwen2Tokenizer"})
    theirs = AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.from_folder(folder, "clip").encode(QUESTION) == theirs(QUESTION)["input_ids"]


@pytest.mark.parametrize("padding", [None, {"strategy": "BatchLongest"}, {"strategy": {"Fixed": 24}}])
@pytest.mark.parametrize("truncation", [False, True])
def test_saved_truncation_and_padding_change_no_question(
    tmp_path: Path, whole: Path, padding: dict | None, truncation: bool
) -> None:
    """`save_pretrained` keeps what one call had set, and transformers resets it for every call."""
    expected = Tokenizer.from_folder(whole, "clip")
    fast = PreTrainedTokenizerFast(tokenizer_file=str(whole / "tokenizer.json"))
    if truncation:
        fast("x", truncation=True, max_length=4)
    fast.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (saved["truncation"] is not None) == truncation
    if padding is not None:
        rest = {"direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
        write(tmp_path, tokenizer_json=saved | {"padding": padding | rest})
    found = Tokenizer.from_folder(tmp_path, "clip")
    assert found.ids == expected.ids and found.encode(QUESTION) == expected.encode(QUESTION)
    assert found.encode("x") == expected.encode("x")
    assert fast(QUESTION)["input_ids"] == expected.encode(QUESTION)


SMALL = {"vocab_json": {"a": 0, "b": 1, "ab": 2}, "merges_txt": "#version: 0.2\na b\n"}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, ["tokenizer.json", "vocab.json", "save the checkpoint's tokenizer"]),
        ({"vocab_json": {"a": 0}}, ["merges.txt does not exist", "download"]),
        (SMALL | {"merges_txt": "a\n"}, ["vocab.json and merges.txt", "download"]),
        (SMALL | {"merges_txt": "a c\n"}, ["vocab.json and merges.txt", "download"]),
        (SMALL | {"vocab_json": ["a"]}, ["vocab.json holds a list", "download"]),
        (SMALL | {"vocab_json": {"a": "0"}}, ["vocab.json", "download"]),
        (SMALL | {"added_tokens_json": {"<x>": 9}}, ["added_tokens.json", "'<x>' the id 9, the vocabulary 3"]),
        (SMALL | {"added_tokens_json": {"a": 3}}, ["added_tokens.json", "'a' the id 3, the vocabulary 0"]),
        (SMALL | {"added_tokens_json": {"<x>": "3"}}, ["added_tokens.json", "'<x>' the id '3'"]),
        (SMALL | {"added_tokens_json": "{"}, ["added_tokens.json is not valid JSON"]),
        (SMALL | {"tokenizer_config_json": {"added_tokens_decoder": [1]}}, ["tokenizer_config.json", "no JSON object"]),
        (SMALL | {"tokenizer_config_json": {"added_tokens_decoder": {"3": 1}}}, ["tokenizer_config.json", "'3'"]),
        (SMALL | {"tokenizer_config_json": {"eos_token": "\ud800"}}, ["tokenizer_config.json", "lone surrogate"]),
        (SMALL | {"added_tokens_json": {"\ud800": 3}}, ["added_tokens.json", "lone surrogate"]),
        (SMALL, ["no token '<|endoftext|>'"]),
    ],
)
def test_broken_files_are_named(tmp_path: Path, files: dict, named: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Tokenizer.from_folder(write(tmp_path, **files), "clip")
    assert all(text in str(raised.value) for text in named), raised.value


def test_the_base_vocabulary_is_the_one_of_the_files(content: dict) -> None:
    assert json.loads(base_tokenizer())["model"]["vocab"] == content["model"]["vocab"]
