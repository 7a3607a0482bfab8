"""Engines of vLLM in this process, and the questions that they and `vpt_model.Engine` are both asked."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.vllm_server import SETTINGS
from tests.helpers import numbers, require
from vpt_model import Engine, Model
from vpt_model.checkpoint import Checkpoint
from vpt_model.engine.events import Answer, Done, Token
from vpt_model.mini.scenes import KINDS, make_question, make_scene
from vpt_model.text.prompt import first_round
from vpt_model.text.tokens import parse_look

# The compiled part too: a folder of that name anywhere on the path would also be found.
require("vllm", None if importlib.util.find_spec("vllm") and importlib.util.find_spec("vllm.v1") else "it is missing")

# Read when vLLM is imported, so after this module; it runs in this process.
os.environ |= SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}

WARM = {"temperature": 0.8, "top_p": 0.95}
TOLERANCE = 1e-4
"""Of log-probabilities in float32, the two decoders being different code."""


@dataclass
class Case:
    """A question about a picture. looks: forced. max_tokens: of all rounds."""

    pixels: np.ndarray | None
    text: str
    looks: Sequence[str] = ()
    max_looks: int = 1
    max_tokens: int = 64
    answer: str | None = None

    def options(self) -> dict[str, Any]:
        looks = {"vpt_looks": list(self.looks)} if self.looks else {}
        return looks | ({"vpt_max_looks": self.max_looks} if self.max_looks != 1 else {})


def scene_cases(count: int, first: int = 0) -> list[Case]:
    """Questions of every kind about test pictures of vpt-mini, with their right answers."""
    cases = []
    for seed in range(first, first + count):
        scene = make_scene(seed, "test")
        for kind in KINDS:
            question = make_question(scene, kind, seed)
            cases.append(Case(scene.pixels, question.text, answer=question.answer))
    return cases


def noise_cases(encoder: str, count: int) -> list[Case]:
    """Pictures of random sizes: encoded again, one region, two regions, the model's own choice, and no look allowed."""
    cases = []
    for number in range(count):
        generator = numbers("serving", encoder, number)
        height, width = (int(side) for side in generator.integers(60, 700, 2))
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for looks in ([encoder], ["region:x1,y2,x4,y5"], ["region:x0,y0,x1,y1+x3,y3,x6,y6"], []):
            cases.append(Case(pixels, f"what is it {number}?", looks))
    return [*cases, Case(pixels, "what is it?", max_looks=0), Case(None, "what is it?")]


def our_engine(folder: Path, **options: Any) -> Engine:
    """`vpt_model.Engine` of a folder in float32."""
    checkpoint = Checkpoint.open(folder)
    model = Model.from_state(checkpoint.config, checkpoint.load(torch.float32))
    return Engine(model, checkpoint.tokenizer(), **{"capacity": 1024} | options)


@contextmanager
def vllm_engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` of a folder in float32; at its end nothing of a request may be left over."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, "block_size": 32}
    llm = LLM(str(folder), **defaults | {"max_num_batched_tokens": 2048} | options)
    try:
        yield llm
        nothing_left(scheduler_of(llm))
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def scheduler_of(llm: Any) -> Any:
    """The scheduler in the engine core of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def nothing_left(scheduler: Any) -> None:
    """Every conversation, slot, request and KV block has been given back."""
    pool = scheduler.kv_cache_manager.block_pool
    assert not scheduler.conversations and not scheduler.requests
    assert sorted(scheduler.free_slots) == list(range(len(scheduler.free_slots))) and len(scheduler.free_slots) >= 64
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's placeholder


def prompt(engine: Engine, case: Case) -> dict[str, Any]:
    """The question as vLLM takes it: ids with one pad, and the picture."""
    tokenizer = engine.tokenizer
    image = case.pixels is not None
    user = tokenizer.encode(engine.prompt.user_text(case.text, image))
    ids = first_round(tokenizer.ids, tokenizer.encode(engine.prompt.system), user, 1 if image else None)
    return {"prompt_token_ids": ids} | ({"multi_modal_data": {"image": Image.fromarray(case.pixels)}} if image else {})


def parameters(case: Case, **changes: Any) -> Any:
    """Greedy, with the log-probability of each token."""
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": case.max_tokens, "skip_special_tokens": False, "logprobs": 0}
    return SamplingParams(**defaults | changes, extra_args=case.options() or None)


def generate(llm: Any, engine: Engine, cases: Sequence[Case], **changes: Any) -> list[Any]:
    """What vLLM says to all cases in one batch."""
    prompts, params = [prompt(engine, case) for case in cases], [parameters(case, **changes) for case in cases]
    return llm.generate(prompts, params, use_tqdm=False)


def warm(llm: Any, engine: Engine, cases: Sequence[Case]) -> list[Any]:
    """What vLLM says to all cases in one batch when it samples, each with a seed of its own."""
    params = [parameters(case, **WARM, seed=number) for number, case in enumerate(cases)]
    return llm.generate([prompt(engine, case) for case in cases], params, use_tqdm=False)


def reference(engine: Engine, case: Case) -> tuple[list[int], Answer]:
    """What our engine says: the tokens of all rounds, without those that were forced, as clients of vLLM see them."""
    tokens: list[int] = []
    engine.max_looks = case.max_looks
    looks = list(case.looks) or None
    for event in engine.stream(case.pixels, case.text, looks=looks, max_new_tokens=case.max_tokens, keep_logits=True):
        if isinstance(event, Token):
            tokens.append(event.id)
        if isinstance(event, Done):
            answer = event.answer
    for look in case.looks:
        forced = parse_look(look, engine.ids)
        assert tokens[: len(forced)] == forced
        del tokens[: len(forced)]
    return tokens, answer


def assert_equal(engine: Engine, cases: Sequence[Case], outputs: Sequence[Any]) -> None:
    """Every conversation has our engine's tokens and looks, and its log-probabilities up to rounding."""
    for case, output in zip(cases, outputs, strict=True):
        expected, answer = reference(engine, case)
        (found,) = output.outputs
        assert list(found.token_ids) == expected, f"{case.text!r}, {case.looks}, {answer.notices}"
        told = (output.kv_transfer_params or {}).get("vpt_looks", [])
        seen = [(look["kind"], [tuple(box) for box in look["boxes"]], look["tokens"]) for look in told]
        assert seen == [(look.kind, list(look.boxes), look.tokens) for look in answer.looks]
        if found.logprobs and answer.ids:
            scores = answer.logits.log_softmax(-1)
            for place, token in enumerate(answer.ids, len(expected) - len(answer.ids)):
                # Behind an announced action the sampled token was not used, nor is its log-probability ours.
                if token in found.logprobs[place]:
                    ours = scores[place - len(expected) + len(answer.ids), token].item()
                    assert abs(found.logprobs[place][token].logprob - ours) < TOLERANCE
