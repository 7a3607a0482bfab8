"""The tokenizer files of a checkpoint, of whatever generation, into one backend.

`tokenizer.json` holds everything. Older folders have `vocab.json` and `merges.txt` in its place, and tokens that were
added later may stand beside either, in `added_tokens.json` or in `tokenizer_config.json`; `special_tokens_map.json`
names special ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# How Qwen2 splits text into words before byte-pair encoding.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONFIG, _ADDED, _SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
_SPECIAL_FIELDS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "additional_special_tokens",
    "extra_special_tokens",
)


def byte_pairs(model: models.BPE) -> tokenizers.Tokenizer:
    """Return Qwen2's byte-level tokenizer around a byte-pair model."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a folder, with every token that its files name; text is never cut and never padded.

    Raises ValueError naming the file where one is missing or unreadable, or where two disagree about a token's id.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a tokenizer: {error}; download it again") from error
    elif (folder / "vocab.json").is_file():
        backend = byte_pairs(_read_pairs(folder / "vocab.json", folder / "merges.txt"))
    else:
        raise ValueError(
            f"{path} does not exist, nor do vocab.json and merges.txt: save the checkpoint's tokenizer into the folder"
        )
    # What a call of transformers set once, save_pretrained keeps; it resets both for every call.
    backend.no_truncation()
    backend.no_padding()
    # A token of the vocabulary alone is spelt in pieces: only what was added is found in a text as a whole.
    whole = {token.content for token in backend.get_added_tokens_decoder().values()}
    for file, token, number in sorted(_numbered_tokens(folder), key=lambda entry: entry[2]):
        if token.content not in whole and backend.token_to_id(token.content) in (None, number):
            _add(backend, token)
        if (found := backend.token_to_id(token.content)) != number:
            raise ValueError(
                f"{folder / file} gives {token.content!r} the id {number}, the vocabulary {found}: use tokenizer files "
                "that were saved together"
            )
    whole |= {token.content for token in backend.get_added_tokens_decoder().values()}
    for content in _special_names(folder):
        if content not in whole:
            _add(backend, AddedToken(content, normalized=False, special=True))
    return backend


def _read_pairs(vocabulary: Path, merges: Path) -> models.BPE:
    if not merges.is_file():
        raise ValueError(f"{merges} does not exist, but {vocabulary.name} does: download both, or tokenizer.json")
    lines = _text(merges).split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    pairs: list[Any] = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    try:
        return models.BPE(vocab=_object(vocabulary), merges=pairs)
    except Exception as error:  # as above
        raise ValueError(
            f"{vocabulary} and {merges.name} are not a vocabulary: {error}; download both again"
        ) from error


def _numbered_tokens(folder: Path) -> Iterator[tuple[str, AddedToken, int]]:
    """Yield the file, token and id of every token that stands beside the vocabulary."""
    special = set(_special_names(folder))
    for content, number in _object(folder / _ADDED).items():
        if type(number) is not int:
            raise ValueError(f"{folder / _ADDED} gives {content!r} the id {number!r}: download it again")
        yield _ADDED, AddedToken(content, normalized=False, special=content in special), number
    decoder = _object(folder / _CONFIG).get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise ValueError(f"{folder / _CONFIG} has an added_tokens_decoder that is no JSON object: download it again")
    for number, fields in decoder.items():
        if not (str(number).isdecimal() and isinstance(fields, Mapping) and isinstance(fields.get("content"), str)):
            raise ValueError(
                f"{folder / _CONFIG} has no token at {number!r} of added_tokens_decoder: download it again"
            )
        options = {name: bool(fields[name]) for name in ("lstrip", "rstrip", "single_word") if name in fields}
        options |= {name: bool(fields.get(name, False)) for name in ("normalized", "special")}
        yield _CONFIG, AddedToken(fields["content"], **options), int(number)


def _special_names(folder: Path) -> Iterator[str]:
    """Yield every special token that is named, with or without an id."""
    for file in (_SPECIAL, _CONFIG):
        content = _object(folder / file)
        for name in _SPECIAL_FIELDS:
            value = content.get(name) or ()
            if isinstance(value, Mapping) and "content" not in value:
                value = list(value.values())
            for token in value if isinstance(value, list) else [value]:
                token = token.get("content") if isinstance(token, Mapping) else token
                if isinstance(token, str) and token:
                    yield token


def _add(backend: tokenizers.Tokenizer, token: AddedToken) -> None:
    (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    if type(content) is not dict:
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: download it again")
    if not _is_text(content):
        raise ValueError(f"{path} holds a lone surrogate, which no text has: download it again")
    return content


def _is_text(content: dict[str, Any]) -> bool:
    try:
        return bool(json.dumps(content, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download it again") from None
