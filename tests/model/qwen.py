"""The tokenizers of the released variants, built from Qwen's byte-pair vocabulary and the tokens added to it."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# Alibaba's SDK ships the vocabulary (Apache-2.0); nothing of it is imported.
PACKAGE = "dashscope==2.0.2"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_VL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
QWEN2_VL += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN2_VL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]


def vocabulary_file() -> Path:
    try:
        path = Path(distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken"))
    except PackageNotFoundError:
        pytest.fail(f"Qwen's vocabulary is not installed: pip install --no-deps {PACKAGE}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


@lru_cache(maxsize=1)
def base_tokenizer() -> str:
    """Qwen2-VL's tokenizer before the perception tokens, as JSON."""
    lines = vocabulary_file().read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in symbols)}

    def text(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    merges = [tuple(map(text, _halves(token, ranks))) for token in ranks if len(token) > 1]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={text(token): rank for token, rank in ranks.items()}, merges=merges)
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN2_VL])
    return backend.to_str()


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens from which byte-pair encoding makes `token`: it merges the pair of lowest rank first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
        best = pairs.index(min(pairs))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def write_tokenizer(folder: Path, kind: str | None, aligned: bool = False) -> None:
    """`tokenizer.json` of a variant: its tokens added in the authors' order, specials first.

    aligned: the intermediate stage, which has the pad only.
    """
    backend = tokenizers.Tokenizer.from_str(base_tokenizer())
    if kind is not None:
        pad = AddedToken(f"<|{kind}_image_pad|>", normalized=False, special=True)
        backend.add_special_tokens([pad])
    if kind is not None and not aligned:
        plain = ["<|region_token_start|>", "<|region_token_end|>"]
        plain += [f"<|{axis}_{i}|>" for axis in "xy" for i in range(8)]
        plain += [f"<|{kind}_action_start|>", f"<|{kind}_action|>", f"<|{kind}_action_end|>"]
        backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
    backend.save(str(folder / "tokenizer.json"))
