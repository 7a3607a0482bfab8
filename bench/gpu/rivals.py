"""What a user would try first for a fast token, over the same weights.

    python -m bench.gpu.rivals transformers|ours PRESET

transformers' decoder over a StaticCache, and our own `LanguageModel.run` in PyTorch's operations, each under
`torch.compile(mode="reduce-overhead")`, which fuses what it can and puts the step into a CUDA graph.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from bench.cases import WrongResult
from bench.gpu import DEVICE, REHEARSAL, record
from bench.gpu.engine import TOKENS, drawn, engine_of, standing
from bench.gpu.timing import device_seconds, synchronize
from bench.transformers_model import transformers_model
from vpt_model.engine import Engine
from vpt_model.engine.graphs import Bucket, Step
from vpt_model.network import decode, fused
from vpt_model.network.cache import KVCache
from vpt_model.network.language import LanguageModel

PROMPT, CAPACITY = 64, 2048


@contextmanager
def composed() -> Iterator[None]:
    """Make our layers PyTorch's operations inside, on a GPU too, for torch.compile to fuse."""
    with mock.patch.object(decode, "on_gpu", lambda x: False), mock.patch.object(fused, "on_gpu", lambda x: False):
        yield


def compiled_as_users_do(call: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(call, **({"backend": "eager"} if REHEARSAL else {"mode": "reduce-overhead"}))


def ours_compiled(preset: str, language: LanguageModel) -> None:
    """Time one token of `LanguageModel.run` under torch.compile, which must say what the step with our kernels says.

    Raises WrongResult where it does not.
    """
    (cache,) = KVCache.side_by_side(1, language.config, CAPACITY, language.dtype, language.device)
    step = Step(Bucket(1, 1, True), language, cache.slab, CAPACITY)
    for name, value in (("tokens", 5), ("slots", PROMPT), ("past", PROMPT), ("counts", 1), ("positions", PROMPT)):
        getattr(step.device, name).fill_(value)
    # Both stand where the step is now: a call leaves it one token further.
    run, compiled = standing(step, step.run), standing(step, compiled_as_users_do(step.run))
    ours = run()[1]
    with composed():
        begin = time.perf_counter()
        for _ in range(3):
            theirs = compiled()[1].clone()
        synchronize()
        record("warm-up", preset=preset, rival="ours, compiled", seconds=time.perf_counter() - begin)
        error = ((ours - theirs).norm() / ours.norm()).item()
        record("gate", preset=preset, rival="ours, compiled", error=error, same=bool(ours.argmax() == theirs.argmax()))
        if not error <= 0.05:
            raise WrongResult(f"our compiled logits differ by {error:.2e}; a wrong rival is not timed")
        seconds = device_seconds(compiled, calls=2 if REHEARSAL else 10)[0]
    record(
        "decode", preset=preset, rival="ours, PyTorch's operations, compiled", dtype="bfloat16", events_ms=seconds * 1e3
    )


@torch.inference_mode()
def main(rival: str, preset: str) -> None:
    engine = engine_of(preset, "clip")
    if rival == "transformers":
        transformers_compiled(preset, engine)
    else:
        ours_compiled(preset, engine.model.language)


def transformers_compiled(preset: str, engine: Engine) -> None:
    """Time transformers' decoder. Raises WrongResult where its logits behind a prompt are not ours."""
    from transformers import StaticCache

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
    compiled = compiled_as_users_do(step)
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
    record(
        "decode",
        preset=preset,
        rival="transformers, StaticCache, compiled",
        dtype="bfloat16",
        wall_ms=wall * 1e3,
        events_ms=seconds * 1e3,
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
