"""Chats as files: everything that a conversation holds, and a fingerprint of the model that made it."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vpt_kernels import PackedWeight
from vpt_model.engine.chat import Chat, Exchange
from vpt_model.engine.conversation import Mark, Picture
from vpt_model.engine.events import Answer, Look
from vpt_model.network.model import Model

if TYPE_CHECKING:
    from vpt_model.engine.engine import Engine

FORMAT = "vpt chat 1"


def fingerprint(model: Model) -> str:
    """Return a digest of the configuration, the dtype and samples of the language model's weights."""
    language = model.language
    digest = hashlib.sha256(json.dumps([asdict(model.config), str(model.dtype)], sort_keys=True, default=str).encode())
    layers = (weight for layer in language.layers for weight in vars(layer).values())
    for weight in (language.embedding, language.head, language.norm, *layers):
        flat = (weight.data if isinstance(weight, PackedWeight) else weight).flatten()
        digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save(chat: Chat, file: Path) -> None:
    conversation = chat.conversation
    keys, values = conversation.cache.gather()
    tensors = {
        "keys": keys,
        "values": values,
        "tokens": torch.tensor(conversation.tokens, dtype=torch.int64, device="cpu"),
    }
    shown, pictures = conversation.pictures, []
    for number, picture in enumerate(shown):
        tensors[f"features.{number}"] = picture.seen
        if picture.pixels is not None:
            tensors[f"pixels.{number}"] = picture.pixels
        pictures.append({"size": picture.size, "grids": picture.grids})
    about = {
        "format": FORMAT,
        "model": fingerprint(chat.engine.model),
        "mark": conversation.mark(),
        "pictures": pictures,
        "looking_at": _number(shown, chat._next),
        "keep_pixels": chat.keep_pixels,
        "exchanges": [
            [e.question, asdict(e.answer) | {"logits": None, "timings": []}, e.before, _number(shown, e.picture)]
            for e in chat.exchanges
        ],
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if os.path.exists(file) and not os.path.isfile(file):  # which the finished file would replace
        raise ValueError(f"{str(file)!a:.300} is a folder or a device: name a file in a folder")
    partial = file.with_name(f"{file.name}.incomplete")
    try:
        save_file(tensors, partial, {"vpt": json.dumps(about)})
        partial.replace(file)
    except (SafetensorError, ValueError) as error:  # a ValueError: it is no name of a file
        raise ValueError(
            f"{str(file)!a:.300} cannot be written ({str(error):.300}): name a file in a folder that exists"
        ) from error
    finally:
        with suppress(OSError, ValueError):  # of a name under which there can be no file
            partial.unlink(missing_ok=True)


def load(engine: Engine, file: Path) -> Chat:
    try:
        with safe_open(file, "pt") as stored:
            about = json.loads((stored.metadata() or {}).get("vpt", "{}"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{str(file)!a:.300} cannot be read ({error}): give a file that Chat.save has written"
        ) from error
    found = about.get("format") if isinstance(about, dict) else about
    if found != FORMAT:
        raise ValueError(f"{file} has format {found!r:.80}, not {FORMAT!r}: give a file of Chat.save")
    if about["model"] != fingerprint(engine.model):
        raise ValueError(f"{file} was saved by another model or in another dtype: load it with the model that made it")
    mark = _mark(about["mark"])
    chat = engine.chat(keep_pixels=about["keep_pixels"])
    try:
        conversation = chat.conversation
        conversation.restore(tensors["tokens"].tolist(), tensors["keys"], tensors["values"], mark)
        device = engine.model.device
        for number, picture in enumerate(about["pictures"]):
            pixels, features = tensors.get(f"pixels.{number}"), tensors[f"features.{number}"].to(device)
            pixels = None if pixels is None else pixels.to(device)
            grids = tuple(map(tuple, picture["grids"]))
            conversation.pictures.append(Picture(pixels, tuple(picture["size"]), features, grids))
        shown = {None: None} | dict(enumerate(conversation.pictures))
        chat._next = shown[about["looking_at"]]
        chat.exchanges = [
            Exchange(asked, _answer(answer), _mark(before), shown[number])
            for asked, answer, before, number in about["exchanges"]
        ]
    except BaseException:
        chat.close()
        raise
    return chat


def _number(pictures: list[Picture], picture: Picture | None) -> int | None:
    """Return the picture's place among them, or None."""
    return next((number for number, one in enumerate(pictures) if one is picture), None)


def _mark(stored: list[Any]) -> Mark:
    length, next_position, pictures, unfed = stored
    return Mark(length, next_position, pictures, tuple(unfed))


def _answer(stored: dict[str, Any]) -> Answer:
    looks = [
        Look(
            look["kind"],
            tuple(map(tuple, look["boxes"])),
            tuple(map(tuple, look["grids"])),
            look["tokens"],
            look["appended"],
        )
        for look in stored["looks"]
    ]
    return Answer(**(stored | {"looks": looks}))
