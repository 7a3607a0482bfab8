"""Read by mypy and pyright, never run: every name of `vpt_model.__all__` as a caller writes it, and what comes back."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

from vpt_model import (
    PRESETS,
    REENCODE_TRIGGER,
    REGION_TRIGGER,
    Answer,
    Done,
    Engine,
    Look,
    Model,
    ModelConfig,
    PromptFormat,
    Reencode,
    Region,
    Sampling,
    Stage,
    Token,
    TokenIds,
    Tokenizer,
)

config = assert_type(PRESETS["tiny"], ModelConfig)
state: dict[str, Tensor] = {}
model = assert_type(Model.from_state(config, state), Model)
assert_type(model.dtype, torch.dtype)
assert_type(model.device, torch.device)
assert_type(Tokenizer.from_folder(Path("model"), config.kind), Tokenizer)
tokenizer = assert_type(Tokenizer.byte_level(config.vocab_size, config.kind), Tokenizer)
assert_type(tokenizer.ids, TokenIds)
assert_type(tokenizer.encode("text"), list[int])
assert_type(tokenizer.decode([1, 2]), str)

prompt = PromptFormat(trigger=REGION_TRIGGER)
assert_type(prompt.user_text(REENCODE_TRIGGER, image=True), str)
engine = Engine(model, tokenizer, max_looks=2, capacity=512, longest_edge=None, prompt=prompt, keep_prefix=True)
assert_type(engine.warm_up(), dict[str, float])
sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, seed=1)
answer = assert_type(engine.ask("photo.jpg", "What?", looks=["region:x1,y1,x2,y2"], sampling=sampling), Answer)
assert_type(engine.ask_batch([None, "photo.jpg"], ["What?", "Where?"], looks=[None, ["clip"]]), list[Answer])
events = assert_type(engine.stream(None, "What?"), Generator[Token | Region | Reencode | Look | Done, None, None])
for event in events:
    if isinstance(event, Done):
        assert_type(event.answer, Answer)
    elif isinstance(event, Look):
        assert_type(event.boxes, tuple[tuple[int, int, int, int], ...])
assert_type(answer.text, str)
assert_type(answer.timings, list[Stage])
assert_type(answer.logits, Tensor | None)
