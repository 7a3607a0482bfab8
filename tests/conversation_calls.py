"""Conversations with an engine and with models of transformers, as the table of public callables makes them."""

from __future__ import annotations

import io
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import vpt_model as model
from tests.helpers import noise
from tests.live import chats
from tests.model.inputs import tiny_model
from vpt_kernels.live import LiveConversation, zoom
from vpt_model.engine import Chat


@lru_cache(maxsize=1)
def image() -> Tensor:
    return noise(40, 56, "calls")


@lru_cache(maxsize=1)
def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(image().numpy()).save(file, "PNG")
    return file.getvalue()


@lru_cache(maxsize=1)
def tokenizer() -> model.Tokenizer:
    return model.Tokenizer.byte_level(320, "clip")


def engine() -> model.Engine:
    return model.Engine(tiny_model(), tokenizer())


def question() -> dict[str, Any]:
    options = {"looks": ["region:x2,y1,x5,y4"], "max_new_tokens": 3, "keep_logits": True}
    return {"image": image(), "question": "what?", "sampling": model.Sampling(0.5, 5, 0.9, 1)} | options


def chatted(**given: Any) -> model.Answer:
    with engine().chat(**given) as chat:
        return chat.ask("what?", max_new_tokens=3)


@lru_cache(maxsize=1)
def saved_chat() -> Path:
    file = Path(tempfile.mkdtemp()) / "chat.safetensors"
    with engine().chat(image()) as chat:
        chat.ask("what?", max_new_tokens=3)
        chat.save(file)
    return file


def resumed(**given: Any) -> model.Answer:
    with engine().load_chat(**given) as chat:
        return chat.ask("and now?", max_new_tokens=3)


def streamed(**given: Any) -> list[Any]:
    return [*engine().stream(**given)]


def chat() -> Chat:
    """One turn old."""
    opened = engine().chat(image())
    opened.ask("what?", max_new_tokens=3)
    return opened


def streamed_turn(**given: Any) -> list[Any]:
    return [*engine().chat().stream(**given)]


def forked(**given: Any) -> list[model.Answer]:
    return [fork.ask("and now?", max_new_tokens=3) for fork in chat().fork(**given)]


def rewound(**given: Any) -> model.Answer:
    asked = chat()
    asked.rewind(**given)
    return asked.ask("and now?", max_new_tokens=3)


def saved(file: Any) -> bytes:
    chat().save(file)
    return Path(file).read_bytes()


@lru_cache(maxsize=1)
def talker() -> torch.nn.Module:
    return chats.model("qwen2_vl")


def parts() -> dict[str, Any]:
    return {"model": talker(), "processor": chats.processor()}


def live(*pictures: bytes) -> LiveConversation:
    conversation = LiveConversation(**parts())
    conversation.add(chats.user("what?", *pictures))
    return conversation


def opened(**given: Any) -> list[int]:
    with LiveConversation(**given) as conversation:
        conversation.append("what?", image())
        return [conversation.length, *conversation.ids]


def appended(**given: Any) -> list[int]:
    conversation = live()
    conversation.append(**given)
    return conversation.ids


def added(**given: Any) -> list[int]:
    conversation = live()
    conversation.generate(max_new_tokens=2, do_sample=False)
    conversation.add(**given)
    return conversation.ids


def generated() -> list[int]:
    conversation = live(png())
    conversation.generate(max_new_tokens=3, do_sample=False)
    conversation.crop((3, 2, 51, 38))
    conversation.append("and now?")
    conversation.generate(max_new_tokens=3, do_sample=False)
    return conversation.ids


def zoomed(**given: Any) -> list[Any]:
    answer = zoom(**given, max_new_tokens=3, do_sample=False)
    answer.conversation.close()
    return [answer.text, answer.turns, answer.boxes]
