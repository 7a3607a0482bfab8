"""transformers' decoder over the same weights, as a user would make it fast: `python -m bench.gpu.rivals PRESET`.

StaticCache and `torch.compile(mode="reduce-overhead")`, which puts the step into a CUDA graph.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from bench.cases import WrongResult
from bench.gpu import DEVICE, REHEARSAL, record
from bench.gpu.engine import TOKENS, drawn, engine_of
from bench.gpu.timing import device_seconds, synchronize
from bench.transformers_model import transformers_model

PROMPT = 64


@torch.inference_mode()
def main(preset: str) -> None:
    from transformers import StaticCache

    engine = engine_of(preset, "clip")
    config, language, ids = engine.model.config, engine.model.language, engine.ids
    model = transformers_model(config, drawn(config), ids.image_pad, ids.vision_start).to(DEVICE)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=PROMPT + 256)
    prompt = torch.arange(3, 3 + PROMPT)
    positions = torch.arange(PROMPT).expand(3, -1)

    def step(tokens: Tensor, at: Tensor) -> Tensor:
        hidden = model.model.language_model(
            input_ids=tokens, position_ids=at[:, None], past_key_values=cache, cache_position=at[0], use_cache=True
        ).last_hidden_state[:, -1]
        return model.lm_head(hidden).float()

    theirs = step(prompt[None].to(DEVICE), positions.to(DEVICE))[0]
    own = language.new_cache(PROMPT)
    ours = language.logits(language.forward(language.embed(prompt), positions, [own], [PROMPT])[-1:])[0]
    error = ((ours - theirs).norm() / theirs.norm()).item()
    record("gate", preset=preset, rival="transformers", error=error, same=bool(ours.argmax() == theirs.argmax()))
    if not error <= 0.05:
        raise WrongResult(f"transformers' logits differ by {error:.2e}; a wrong rival is not timed")
    begin = time.perf_counter()
    compiled = torch.compile(step, **({"backend": "eager"} if REHEARSAL else {"mode": "reduce-overhead"}))
    token, at = torch.full((1, 1), 5, device=DEVICE), torch.full((3, 1), PROMPT, device=DEVICE)
    for _ in range(3):
        compiled(token, at)
    synchronize()
    record("warm-up", preset=preset, rival="transformers, compiled", seconds=time.perf_counter() - begin)
    seconds = device_seconds(lambda: compiled(token, at), calls=2 if REHEARSAL else 10)[0]
    begin = time.perf_counter()
    for number in range(TOKENS):
        token.fill_(int(compiled(token, at).argmax()))
        at.fill_(PROMPT + 1 + number)
    wall = (time.perf_counter() - begin) / TOKENS
    record("decode", preset=preset, rival="transformers, StaticCache, compiled", dtype="bfloat16",
           wall_ms=wall * 1e3, events_ms=seconds * 1e3)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
