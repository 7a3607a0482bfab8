"""Tokens of an answer, one by one: this engine, transformers over the same weights, and a mere read of the weights."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from unittest.mock import patch

import torch
from torch import Tensor

from bench.cases import Alternative, Case, WrongResult, absent, sweep
from bench.cases.engine import continued, our_linear, procedures, transformers_twin
from bench.loops import Loops
from bench.rooflines import Work
from bench.workloads import Decode
from vpt_kernels import PackedWeight
from vpt_model.app.demo import QUESTION, default_image
from vpt_model.engine.events import Token


class Decoding:
    """Greedy tokens behind the prompt; every way chooses for itself, and all must choose the same."""

    def __init__(self, workload: Decode, device: str) -> None:
        self.workload, self.names, self.device = workload, (workload.preset, "clip", device, workload.weights), device
        self.made, self.photo = procedures(*self.names), default_image()
        self.count, self.batch = workload.tokens, workload.batch
        language = self.made.engine.model.language
        # A tied embedding is read whole by the head; of its own rows one per token.
        self.weights = [weight for layer in language.layers for weight in vars(layer).values()] + [language.head]
        self.ids, self.prompt = self._ours()[1], self.made.engine.executor.fed[0]

    @cached_property
    def decoded(self) -> Decoded:
        """transformers behind the same prompt, for both of its ways."""
        return Decoded(self)

    def ours(self) -> float:
        """Return the seconds per token of every row."""
        return self._ours()[0]

    def _ours(self) -> tuple[float, list[list[int]]]:
        engine, times = self.made.engine, []
        ids: list[list[int]] = [[] for _ in range(self.batch)]
        engine.executor.fed = []
        # Random weights may choose to stop; what is timed is a number of tokens.
        with patch.object(engine.loop, "ids", replace(engine.ids, stop=frozenset())):
            questions = [engine.question(self.photo, QUESTION, max_new_tokens=1 + self.count) for _ in ids]
            for row, event in engine.events(questions):
                if isinstance(event, Token):
                    ids[row].append(event.id)
                    if row == self.batch - 1:
                        times.append(time.perf_counter())
        return (times[-1] - times[0]) / self.count, ids

    def read(self) -> float:
        """Return the seconds to read the weights that a token needs, once."""
        if self.device == "cpu":
            return self.loops.read(self.buffers, torch.get_num_threads())
        begin = time.perf_counter()
        for weight in self.weights:
            weight.sum()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    @cached_property
    def loops(self) -> Loops:
        return Loops.compiled()

    @cached_property
    def buffers(self) -> list[tuple[int, int]]:
        tensors = [weight.data if isinstance(weight, PackedWeight) else weight for weight in self.weights]
        return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]

    @property
    def work(self) -> Work:
        stored = len(self.prompt.tokens) + self.count // 2
        cache = self.made.engine.pool.idle[0].bytes_per_token * stored
        return Work(sum(weight.nbytes for weight in self.weights) + self.batch * cache, 0)


class Decoded:
    """The same tokens by transformers over the same weights, prompt and positions; a call forgets what it appended."""

    def __init__(self, problem: Decoding) -> None:
        from transformers import DynamicCache

        self.problem, self.model = problem, transformers_twin(*problem.names)
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        prompt = problem.prompt.embeds.expand(problem.batch, -1, -1)
        self.first = self._step(prompt, problem.prompt.positions)
        self.length, self.position = self.cache.get_seq_length(), int(problem.prompt.positions.max()) + 1

    def __call__(self) -> float:
        return self.decode()[0]

    def with_our_linear(self) -> float:
        with our_linear():
            return self.decode()[0]

    def decode(self) -> tuple[float, list[list[int]]]:
        begin, ids = time.perf_counter(), [self.first]
        for number in range(self.problem.count):
            tokens = torch.tensor(ids[-1], device=self.problem.device)[:, None]
            embeds = self.model.model.language_model.embed_tokens(tokens)
            ids.append(self._step(embeds, torch.full((3, 1), self.position + number)))
        seconds = (time.perf_counter() - begin) / self.problem.count
        self.cache.crop(self.length - self.cache.get_seq_length())
        return seconds, [list(row) for row in zip(*ids)]

    def _step(self, embeds: Tensor, positions: Tensor) -> list[int]:
        """Return the next token of every row, from embeddings [batch, T, H] at the same positions [3, T]."""
        return self.model.lm_head(continued(self.model, self.cache, embeds, positions)).argmax(-1).tolist()


DECODED = Alternative(
    "transformers, its cache continued",
    "Qwen2-VL of transformers (SDPA) over the same weights, greedy, DynamicCache",
    lambda problem: problem.decoded,
    lambda problem: absent("transformers"),
)
FLOOR = Alternative(
    "floor: the weights read once",
    "every weight a token needs: by the loop that measures bandwidth; of tensors, as on a GPU, by sum()",
    lambda problem: problem.read,
)
DECODED_WITH_OUR_LINEAR = Alternative(
    "transformers, with our float32 products",
    "the same, its nn.Linear multiplying as the engine does",
    lambda problem: problem.decoded.with_our_linear,
    lambda problem: absent("transformers") if problem.device == "cpu" else "the same: products differ on a CPU only",
)
ALTERNATIVES = (DECODED, FLOOR, DECODED_WITH_OUR_LINEAR)


def build(workload: Decode, device: str) -> Case:
    problem = Decoding(workload, device)
    alternatives = {one.name: one.calls([problem]) for one in ALTERNATIVES}

    def check() -> None:
        found = {"ours": problem._ours()[1]}
        if not absent("transformers"):
            for one, context in ((DECODED, nullcontext), (DECODED_WITH_OUR_LINEAR, our_linear)):
                with context():
                    found[one.name] = problem.decoded.decode()[1]
        for name, ids in found.items():
            if ids != problem.ids:
                raise WrongResult(f"{name}: tokens {ids} instead of {problem.ids}; a wrong row is not timed")

    return Case(
        workload.op,
        workload.shape,
        workload.dtype,
        device,
        [problem.ours],
        alternatives,
        check,
        problem.work,
        self_timed=True,
        sweep=sweep(workload.op, workload),
    )
