"""The second look, from the trigger token to the first answer token: three ways.

This engine appends it; the published procedure begins again; transformers continues its own cache with explicit
positions, the fastest thing it can do, and for the clip look even reuses the features of the first. A fourth way gives
transformers this engine's float32 products, so that what remains is not a matter of libraries. All have the same
random weights, photo and forced tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import median
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Alternative, Case, WrongResult, absent, sweep
from bench.transformers_model import transformers_model
from bench.workloads import SecondLook
from vpt_kernels import pack_weight
from vpt_model.app.demo import QUESTION, default_image
from vpt_model.checkpoint import random_state
from vpt_model.config import ENCODERS, PRESETS
from vpt_model.engine import Engine
from vpt_model.engine.events import Clock, Look, Stage, Token
from vpt_model.engine.executor import Captured, Eager, Fed
from vpt_model.engine.requests import Append
from vpt_model.network.linear import linear
from vpt_model.network.model import Model
from vpt_model.network.state import rounded
from vpt_model.published.procedure import PublishedProcedure
from vpt_model.text.tokens import Tokenizer

LONGEST_EDGE, CAPACITY = 512, 8192
TOLERANCES = {"2b-slice": 1e-3, "2b": 1e-2}
"""On logits of standard deviation 1; a wrong step moves them by 0.03 or more, rounding by 2e-5 behind two random layers
and by 2e-3 behind 28."""


_PACKED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@contextmanager
def our_linear() -> Iterator[None]:
    """Let transformers' linear layers, and its patch embedding, which is a product, multiply as this engine does."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

    def product(layer: Any, x: Tensor) -> Tensor:
        if layer not in _PACKED:
            _PACKED[layer] = pack_weight(layer.weight.flatten(1)) if x.device.type == "cpu" else layer.weight.flatten(1)
        return linear(x.flatten(0, -2), _PACKED[layer], layer.bias).unflatten(0, x.shape[:-1])

    def layer(self: torch.nn.Linear, x: Tensor) -> Tensor:
        return product(self, x)

    def embedding(self: PatchEmbed, patches: Tensor) -> Tensor:
        return product(self.proj, patches)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.nn.Linear, "forward", layer))
        stack.enter_context(patch.object(PatchEmbed, "forward", embedding))
        yield


class Recorder:
    """An executor that remembers what another one feeds to the language model, and what that said last."""

    def __init__(self, executor: Eager | Captured) -> None:
        self.fed: list[Append] = []
        self.said: list[Fed] = []
        self.run, feed = executor.run, executor.feed

        def recorded(appends: Sequence[Append]) -> list[Fed]:
            self.fed += appends
            self.said = feed(appends)
            return self.said

        executor.feed = recorded  # type: ignore[method-assign]


@dataclass
class Procedures:
    """The engine and the published procedure over the same random weights."""

    engine: Engine
    published: PublishedProcedure
    state: dict[str, Tensor]


@lru_cache(maxsize=1)  # several looks of one model follow one another
def procedures(preset: str, kind: str, device: str, weights: str = "float32") -> Procedures:
    """Return all in float32, over weights that the precision `weights` of the engine's holds exactly."""
    config = replace(PRESETS[preset], kind=kind)
    tokenizer = Tokenizer.byte_level(config.vocab_size, kind)
    state = {name: tensor.to(device) for name, tensor in rounded(random_state(config), weights).items()}
    capacity = min(CAPACITY, config.max_position_embeddings)
    engine = Engine(Model.from_state(config, state, weights), tokenizer, longest_edge=LONGEST_EDGE, capacity=capacity)
    engine.warm_up()
    engine.executor = Recorder(engine.executor)
    return Procedures(engine, PublishedProcedure(config, state, tokenizer.ids, tokenizer), state)


@lru_cache(maxsize=1)
def transformers_twin(preset: str, kind: str, device: str, weights: str = "float32") -> Any:
    """Return transformers' Qwen2-VL over the same weights."""
    made = procedures(preset, kind, device, weights)
    ids = made.engine.ids
    # Beside the weights there are tables of frequencies, which no state dict holds.
    return transformers_model(made.engine.model.config, made.state, ids.image_pad, ids.vision_start).to(device)


class Problem:
    """One forced look."""

    def __init__(self, workload: SecondLook, device: str) -> None:
        self.workload, self.device = workload, device
        self.names = (workload.preset, ENCODERS.get(workload.look, ENCODERS["clip"]), device, workload.weights)
        made = procedures(*self.names)
        self.engine, self.published, self.state = made.engine, made.published, made.state
        self.look, self.photo = workload.look, default_image()
        # One token a byte: the conversation before the question is text that every procedure reads.
        self.question = "x" * workload.history + QUESTION
        self.before = 0  # chunks fed before the trigger token
        self.stages: dict[str, list[dict[str, float]]] = {}

    @cached_property
    def twin(self) -> Any:
        """transformers' model over the same weights."""
        return transformers_twin(*self.names)

    @cached_property
    def continued(self) -> Continued:
        """transformers behind the first look, for both of its ways."""
        return Continued(self)

    def ours(self) -> float:
        """Return the seconds from the trigger token to the first answer token."""
        return self._ours()[0]

    def _ours(self) -> tuple[float, Tensor]:
        triggers, begin, looked = {self.engine.ids.region_end, self.engine.ids.action_start}, 0.0, False
        self.engine.executor.fed = []
        stream = self.engine.stream(self.photo, self.question, looks=[self.look], max_new_tokens=1, keep_logits=True)
        for event in stream:
            if isinstance(event, Token) and looked:
                seconds = time.perf_counter() - begin
                break
            if isinstance(event, Token) and event.id in triggers:
                begin = time.perf_counter()
                self.before = len(self.engine.executor.fed)
            looked |= isinstance(event, Look)
        *_, done = stream
        self.saw("ours", seconds, done.answer.timings)
        return seconds, done.answer.logits[0]

    def publish(self) -> float:
        return self._publish()[0]

    def _publish(self) -> tuple[float, Tensor]:
        answer = self.published.ask(self.photo, self.question, looks=[self.look], max_new_tokens=1, keep_logits=True)
        self.saw(PUBLISHED.name, answer.second_look_ms / 1e3, answer.timings)
        return answer.second_look_ms / 1e3, answer.logits[0]

    def saw(self, name: str, seconds: float, timings: Sequence[Stage]) -> None:
        """Remember the stages of one second look: all that follow the first round, and the rest."""
        last = max((i for i, stage in enumerate(timings) if stage.name in ("prefill", "decode")), default=-1)
        stages: dict[str, float] = {}
        for stage in timings[last + 1 :]:
            stages[stage.name] = stages.get(stage.name, 0.0) + stage.milliseconds
        stages["rest"] = max(0.0, seconds * 1e3 - sum(stages.values()))
        self.stages.setdefault(name, []).append(stages)

    def timeline(self) -> dict[str, dict[str, float]]:
        """Return the medians over all calls, in the order in which the stages begin."""
        return {
            name: {stage: median(call.get(stage, 0.0) for call in calls) for stage in calls[-1]}
            for name, calls in self.stages.items()
        }


def continued(model: Any, cache: Any, embeds: Tensor, positions: Tensor) -> Tensor:
    """Return transformers' last hidden states [batch, H] of embeddings [batch, T, H] at each row's positions [3, T]."""
    output = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions[:, None].expand(-1, len(embeds), -1).to(embeds.device),
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state[:, -1]


class Continued:
    """transformers with the cache of the first look; every call takes the second look and forgets it again."""

    def __init__(self, problem: Problem) -> None:
        from PIL import Image
        from transformers import DynamicCache
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        engine, self.nearest = problem.engine, Image.Resampling.NEAREST
        problem.ours()
        fed = engine.executor.fed
        first, self.second = fed[: problem.before], fed[problem.before :]
        self.problem, self.state, self.ids = problem, problem.state, engine.ids
        self.model = problem.twin
        self.processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12_845_056)
        self.clock = Clock(torch.device("cpu"))
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.boxes = next(
            event.boxes
            for event in engine.stream(problem.photo, problem.question, looks=[problem.look], max_new_tokens=1)
            if isinstance(event, Look)
        )
        width, height = problem.photo.size
        self.features = self._see([(0, 0, width, height)])
        for chunk in first:
            self._forward(chunk, self._embed(chunk.tokens, self.features))
        self.length = self.cache.get_seq_length()

    def __call__(self) -> float:
        return self._timed(CONTINUED.name)

    def with_our_linear(self) -> float:
        with our_linear():
            return self._timed(WITH_OUR_LINEAR.name)

    def _timed(self, name: str) -> float:
        self.clock = Clock(torch.device("cpu"))
        begin = time.perf_counter()
        self.look()
        seconds = time.perf_counter() - begin
        self.problem.saw(name, seconds, self.clock.stages)
        self.forget()
        return seconds

    def forget(self) -> None:
        self.cache.crop(self.length - self.cache.get_seq_length())

    def look(self) -> Tensor:
        """Return the logits of the first answer token."""
        *earlier, chunk = self.second
        for one in earlier:
            with nullcontext() if self.boxes else self.clock("perceive"):
                state = self._forward(one, self._embed(one.tokens))
                if one.logits:  # whether the first round ends here is not known before
                    int(self.model.lm_head(state)[0].argmax())
        if self.boxes:
            features = self._see(self.boxes)
            embeds = self._embed(chunk.tokens, features)
        else:
            embeds = self._embed(chunk.tokens)
            embeds[0] = state
            with self.clock("perceive"):
                embeds[self._ids(chunk.tokens) == self.ids.kind_pad] = self._project(state)
        with self.clock("append"):
            hidden = self._forward(chunk, embeds)
            logits = self.model.lm_head(hidden)[0]
            int(logits.argmax())
        return logits

    def _see(self, boxes: Sequence[tuple[int, int, int, int]]) -> Tensor:
        crops = []
        for box in boxes:
            crop = self.problem.photo.crop(box)
            if max(crop.size) > LONGEST_EDGE:
                scale = LONGEST_EDGE / max(crop.size)
                crop = crop.resize([int(side * scale) for side in crop.size], self.nearest)
            crops.append(crop)
        with self.clock("crop+embed"):
            inputs = self.processor(images=crops, return_tensors="pt").to(self.problem.device)
        with self.clock("ViT"):
            return self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output

    def _project(self, control: Tensor) -> Tensor:
        def layer(name: str) -> tuple[Tensor, Tensor]:
            return self.state[f"clip_projector.{name}.weight"], self.state[f"clip_projector.{name}.bias"]

        normal = F.layer_norm(control, control.shape[-1:], *layer("layernorm_condition"), 1e-5)
        k = F.linear(normal, *layer("linear_condition"))
        return self.features + (self.features @ k.T) * k

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=self.problem.device)

    def _embed(self, tokens: Sequence[int], features: Tensor | None = None) -> Tensor:
        ids = self._ids(tokens)
        embeds = self.model.model.language_model.embed_tokens(ids)
        if features is not None and (ids == self.ids.image_pad).any():
            embeds[ids == self.ids.image_pad] = features
        return embeds

    def _forward(self, chunk: Append, embeds: Tensor) -> Tensor:
        return continued(self.model, self.cache, embeds[None], chunk.positions)


def _no_transformers(problem: Problem) -> str | None:
    return "has no such re-encoder" if problem.workload.look in ("dino", "sam") else absent("transformers")


def _no_transformers_here(problem: Problem) -> str | None:
    return _no_transformers(problem) if problem.device == "cpu" else "the same: products differ on a CPU only"


CONTINUED = Alternative(
    "transformers, cache continued with explicit positions",
    "Qwen2-VL of transformers (SDPA) over the same weights, its DynamicCache continued with our positions",
    lambda problem: problem.continued,
    _no_transformers,
)
WITH_OUR_LINEAR = Alternative(
    "transformers, the same with our float32 products",
    "the same, its nn.Linear and patch embedding multiplying as the engine does (oneDNN)",
    lambda problem: problem.continued.with_our_linear,
    _no_transformers_here,
)
PUBLISHED = Alternative(
    "published procedure",
    "the conversation prefilled again, two language-model calls a token",
    lambda problem: problem.publish,
)
ALTERNATIVES = (CONTINUED, WITH_OUR_LINEAR, PUBLISHED)


def build(workload: SecondLook, device: str) -> Case:
    problem = Problem(workload, device)
    alternatives = {one.name: one.calls([problem]) for one in ALTERNATIVES}

    def check() -> None:
        (_, ours), limit = problem._ours(), TOLERANCES[workload.preset]
        others = {PUBLISHED.name: problem._publish()[1]}
        if not _no_transformers(problem):
            for one, context in ((CONTINUED, nullcontext), (WITH_OUR_LINEAR, our_linear)):
                with context():
                    others[one.name] = problem.continued.look()
                problem.continued.forget()
        for other, logits in others.items():
            difference = (ours - logits).abs().max().item()
            if not difference <= limit or int(ours.argmax()) != int(logits.argmax()):
                raise WrongResult(
                    f"{other}: logits of the first answer token differ by {difference:.1e}, limit {limit:.0e}; "
                    "a wrong row is not timed"
                )

    return Case(
        workload.op,
        workload.shape,
        workload.dtype,
        device,
        [problem.ours],
        alternatives,
        check,
        None,
        self_timed=True,
        sweep=sweep(workload.op, workload),
        timeline=problem.timeline,
    )
