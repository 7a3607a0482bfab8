"""What `vpt demo` runs: the same forced conversations by the engine and by the published procedure, compared.

Both get the same float32 weights, photo, question and forced looks; the logits of every answer step are compared.
vpt-mini, whose weights are trained, first answers questions about a picture of its test split on its own.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vpt_kernels import decode_image
from vpt_model import mini
from vpt_model.checkpoint import random_weights
from vpt_model.checkpoint.draw import Drawn
from vpt_model.checkpoint.load import moved
from vpt_model.config import ENCODERS, PRESETS, ModelConfig
from vpt_model.engine import Engine
from vpt_model.engine.events import Answer, Box, Done, Look, Token
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import Decode, Output, ReencodeAndAppend, Request
from vpt_model.mini.scenes import make_question, make_scene
from vpt_model.mini.story import Chapter, tell
from vpt_model.network.cache import KVCache
from vpt_model.network.encoders import ieee_convolutions
from vpt_model.network.model import Model
from vpt_model.network.state import packed_precision, rounded
from vpt_model.published.procedure import PublishedProcedure
from vpt_model.text.tokens import RegionSpan, Tokenizer, parse_look, parse_region_ids

CPU = torch.device("cpu")
QUESTION = "Which of these galaxies is the largest?"
LOOKS = ("region:x2,y1,x5,y4", "clip")

# The largest difference of logits (standard deviation 1) that float32 rounding may explain; a wrong step moves them by
# 0.03 or more. Measured: 1e-5 for `mini`, 5e-6 for `tiny`, 2e-5 for `2b-slice`. 28 random layers amplify rounding:
# 2e-3 for `2b`, with peakier attention than now. bfloat16 would prove nothing there: its rounding alone moved the
# logits of `2b` by 2 to 6.
LIMITS = {"mini": 1e-4, "tiny": 1e-4, "2b-slice": 1e-4, "2b": 1e-2, "7b": 1e-2}
# Beside weights of integers our activations are rounded to 16 bits, the published procedure's are not. Measured: up to
# 6e-4 for `mini` and `tiny`, int8 and int4.
ROUNDED_LIMIT = 2e-3
TRAINED = "mini"
"""The preset with trained weights, which the package ships."""


@dataclass(frozen=True)
class Step:
    """The work of one stage in the first or second look; `work` counts it under names common to both procedures."""

    look: int
    name: str
    milliseconds: float
    work: dict[str, int]


@dataclass(frozen=True)
class Run:
    """One conversation by one procedure; times in milliseconds since its start."""

    ids: list[int]
    text: str
    steps: list[Step]
    trigger_at: float
    answer_at: float
    total: float

    @property
    def second_look(self) -> float:
        """Milliseconds from the trigger token to the first answer token."""
        return self.answer_at - self.trigger_at


@dataclass(frozen=True)
class Comparison:
    """One look, taken both ways.

    regions: the cells that the look names. boxes: the crops shown, in pixels. difference: the largest of any logit at
    any answer step.
    """

    look: str
    regions: list[RegionSpan]
    boxes: list[Box]
    ours: Run
    published: Run
    difference: float

    @property
    def identical(self) -> bool:
        return self.ours.ids == self.published.ids

    @property
    def speedup(self) -> float:
        """How many times as fast our second look is."""
        return self.published.second_look / self.ours.second_look


@dataclass(frozen=True)
class Report:
    """All looks of one demo; `story`: what the trained model did by itself, empty for random weights.

    warm_up: the seconds that each part of the engine's took, on a GPU.
    """

    preset: str
    image: Image.Image
    question: str
    limit: float
    inject: str | None = None
    device: torch.device = CPU
    warm_up: dict[str, float] = field(default_factory=dict)
    story: list[Chapter] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def overhead(self) -> bool:
        """Whether the model is so small that its times are mostly Python's and say little about the work."""
        return PRESETS[self.preset].hidden_size < 1024

    @property
    def passed(self) -> bool:
        return all(look.identical and look.difference <= self.limit for look in self.comparisons)


class WrongControl:
    """Re-encodes under the control state's negative."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        return [
            replace(result, control=-result.control)
            if isinstance(result, ReencodeAndAppend) and result.control is not None
            else result
            for result in self.executor.run(requests)
        ]


class WrongPosition:
    """Appends the second look one position too far."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        return self.executor.run([self._shifted(request) for request in requests])

    def _shifted(self, request: Request) -> Request:
        if (
            isinstance(request, Decode)
            or not request.conversation.length
            or getattr(request, "control", None) is not None
        ):
            return request
        positions = request.positions.clone()
        positions[:, isinstance(request, ReencodeAndAppend) :] += 1  # the token that asks for it stays where it is
        return replace(request, positions=positions, next_position=request.next_position + 1)


class WrongSlot:
    """Stores the second look's keys and values one slot too far."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        for request in requests:
            cache = request.conversation.cache
            vars(cache)["slots"] = partial(self._shifted, cache)
        return self.executor.run(requests)

    def _shifted(self, cache: KVCache, count: int) -> Tensor:
        return KVCache.slots(cache, count) + int(cache.length > 0 and count > 1)


FAULTS: dict[str, Callable[[Executor], Executor]] = {
    "control": WrongControl,
    "position": WrongPosition,
    "slot": WrongSlot,
}


def default_image() -> Image.Image:
    """Return the Hubble deep field that scikit-image ships, 1000×872. Raises ValueError without scikit-image."""
    try:
        from skimage import data
    except ImportError as error:
        raise ValueError(
            "the demo's photo comes with scikit-image: pip install 'vpt-kernels[demo]', or pass --image FILE"
        ) from error
    return Image.fromarray(data.hubble_deep_field())


@ieee_convolutions()
def run(
    preset: str = TRAINED,
    looks: Sequence[str] | None = None,
    image: Any = None,
    question: str | None = None,
    max_new_tokens: int = 12,
    inject: str | None = None,
    seed: int = 3,
    progress: Callable[[str], None] = lambda activity: None,
    device: torch.device = CPU,
    weights: str = "auto",
) -> Report:
    """Compare both procedures on every look; `progress` is told what begins, `activities(preset, looks)` times.

    On a GPU the engine is warmed up, but for one that is corrupted, whose graphs would hide it; convolutions compute
    in float32 there, not in TensorFloat-32. seed: of vpt-mini's test scene, which is its picture, and whose first
    question it is asked. The other presets have random weights and look at `image`. weights: the precision in which
    the engine keeps its own (`Model.from_state`); the published procedure then computes, in float32, with the numbers
    that this precision holds, and caches stay float32, so that both still have to agree. Raises ValueError or
    TypeError on bad input, before any weight is made.
    """
    packed_precision(weights, torch.float32, device)
    if weights == "w8a8":
        raise ValueError(
            "weights is 'w8a8', which rounds activations to 8 bits: more than what tells a wrong step; use 'int8'"
        )
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    if inject is not None and inject not in FAULTS:
        raise ValueError(f"inject is {inject!r}; it must be one of {', '.join(FAULTS)}")
    if preset == TRAINED and image is not None:
        raise ValueError("vpt-mini is shown pictures of its own task: choose one by --seed, or give another --preset")
    scene = make_scene(seed, "test") if preset == TRAINED else None
    asked = make_question(scene, "tag", seed) if scene else None
    looks = default_looks(preset, seed) if looks is None else looks
    groups = _by_encoder(looks)
    if not groups:
        raise ValueError("there is no look to compare: give at least one")
    if preset == TRAINED and set(groups) != {"clip"}:
        raise ValueError(f"vpt-mini re-encodes by clip only, not by {', '.join(set(groups) - {'clip'})}")
    if inject == "control" and not set(looks) & set(ENCODERS):
        raise ValueError("inject 'control' needs a look that uses the control state: add --look clip")
    vocabulary = PRESETS[preset].vocab_size
    tokenizers = {encoder: Tokenizer.byte_level(vocabulary, ENCODERS[encoder]) for encoder in groups}
    regions = {
        look: parse_region_ids(parse_look(look, tokenizers[encoder].ids), tokenizers[encoder].ids)
        for encoder, group in groups.items()
        for look in group
    }
    if scene is not None and asked is not None:
        photo, question = Image.fromarray(scene.pixels), question or asked.text
    else:
        photo = default_image() if image is None else Image.fromarray(decode_image(image).numpy())
        question = question or QUESTION

    limit = max(LIMITS[preset], ROUNDED_LIMIT) if weights in ("int8", "int4") else LIMITS[preset]
    report = Report(preset, photo, question, limit, inject, device)
    options = {"max_new_tokens": max_new_tokens, "keep_logits": True}
    for encoder, group in groups.items():
        # One procedure after the other: both together would have the weights in memory twice.
        progress(f"{_made(preset, encoder)} for this engine")
        config, state, tokenizer = _weights(preset, encoder, weights, device)
        model = Model.from_state(config, state, weights, consume=True)
        model.language.cache_dtype = model.dtype
        engine = Engine(model, tokenizer)
        if inject is not None:
            engine.executor = FAULTS[inject](engine.executor)
        progress("warming up")
        if inject is None:
            report.warm_up.update({f"{encoder}: {part}": spent for part, spent in engine.warm_up().items()})
        engine.ask(photo.resize((112, 112)), question, looks=[encoder], max_new_tokens=2)
        if scene is not None:
            progress("vpt-mini answers by itself")
            report.story.extend(tell(engine, scene, seed))
        ours = {}
        for look in group:
            progress(f"{look}: this engine")
            ours[look] = _median(report, partial(_ours, engine, photo, question, looks=[look], **options))
        del engine, model, state
        gc.collect()  # an engine's parts know each other

        progress(f"{_made(preset, encoder)} for the published procedure")
        config, state, tokenizer = _weights(preset, encoder, weights, device)
        published = PublishedProcedure(config, state, tokenizer.ids, tokenizer)
        published.ask(photo.resize((112, 112)), question, looks=[encoder], max_new_tokens=2)
        for look in group:
            progress(f"{look}: published procedure")
            theirs, expected = _median(report, partial(_published, published, photo, question, looks=[look], **options))
            mine, logits, boxes = ours[look]
            common = min(len(logits), len(expected))
            difference = (logits[:common] - expected[:common]).abs().max().item()
            report.comparisons.append(Comparison(look, regions[look], boxes, mine, theirs, difference))
        del published, state
        gc.collect()
    return report


def default_looks(preset: str, seed: int) -> list[str]:
    """Return a region and a re-encoding; vpt-mini's region is the one that its first question is about."""
    if preset != TRAINED:
        return list(LOOKS)
    region = make_question(make_scene(seed, "test"), "tag", seed).look
    return [region, "clip"] if region else ["clip"]


def _made(preset: str, encoder: str) -> str:
    return "loading vpt-mini" if preset == TRAINED else f"making random weights of {preset} with {encoder}"


def _weights(
    preset: str, encoder: str, weights: str, device: torch.device
) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer]:
    """Return the numbers that both compute with, float32, the same in every call."""
    made: Mapping[str, Tensor | Drawn]
    if preset == TRAINED:
        config, made, tokenizer = mini.load_state()
    else:
        config = replace(PRESETS[preset], kind=ENCODERS[encoder])
        made, tokenizer = random_weights(config), Tokenizer.byte_level(config.vocab_size, config.kind)
    return config, moved(rounded(made, weights), device), tokenizer


def _by_encoder(looks: Sequence[str]) -> dict[str, list[str]]:
    """Return the looks that each variant's model takes; regions, which every variant has, go to the first one asked
    for.
    """
    asked = [look for look in looks if look in ENCODERS] or ["clip"]
    groups: dict[str, list[str]] = {}
    for look in looks:
        groups.setdefault(look if look in ENCODERS else asked[0], []).append(look)
    return groups


def activities(preset: str, looks: Sequence[str]) -> int:
    """Return how often `run` calls `progress`."""
    return (3 + (preset == TRAINED)) * len(_by_encoder(looks)) + 2 * len(looks)


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values; milliseconds, pixels, logits."""

    def timed(run: Run) -> dict[str, Any]:
        steps = [{"look": s.look, "stage": s.name, "milliseconds": s.milliseconds, "work": s.work} for s in run.steps]
        times = {"second_look_ms": run.second_look, "total_ms": run.total}
        return {"ids": run.ids, "text": run.text, **times, "stages": steps}

    return {
        "preset": report.preset,
        "weights": "trained" if report.preset == TRAINED else "random",
        "dtype": "float32",
        "times_are_overhead": report.overhead,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "image": list(report.image.size),
        "question": report.question,
        "injected": report.inject,
        "device": str(report.device),
        "warm_up_seconds": report.warm_up,
        "limit": report.limit,
        "passed": report.passed,
        "story": [
            {
                "kind": chapter.question.kind,
                "question": chapter.question.text,
                "said": chapter.said,
                "boxes": [list(box) for box in chapter.boxes],
                "answer": chapter.answer.text,
                "truth": chapter.question.answer,
                "right": chapter.right,
                "timeline": [[moment.milliseconds, moment.what] for moment in chapter.moments],
            }
            for chapter in report.story
        ],
        "looks": [
            {
                "look": look.look,
                "boxes": [list(box) for box in look.boxes],
                "ids_identical": look.identical,
                "largest_logit_difference": look.difference,
                "second_look_speedup": look.speedup,
                "total_speedup": look.published.total / look.ours.total,
                "ours": timed(look.ours),
                "published": timed(look.published),
            }
            for look in report.comparisons
        ],
    }


def _median(report: Report, ask: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return what `ask` returns, a Run first; of a model of short times, its median run."""
    asked = sorted((ask() for _ in range(5 if report.overhead else 1)), key=lambda answer: answer[0].total)
    return asked[len(asked) // 2]


def _ours(engine: Engine, *request: Any, **options: Any) -> tuple[Run, Tensor, list[Box]]:
    triggers = {engine.ids.region_end, engine.ids.action_start}
    start, times, looked = time.perf_counter(), dict[str, float](), False
    answer: Answer | None = None
    for event in engine.stream(*request, **options):
        now = (time.perf_counter() - start) * 1e3
        if isinstance(event, Token) and looked:
            times.setdefault("answer_at", now)
        elif isinstance(event, Token) and event.id in triggers:
            times["trigger_at"] = now
        elif isinstance(event, Look):
            looked = True
        elif isinstance(event, Done):
            answer = event.answer
    assert answer is not None and answer.logits is not None, "a stream ends with an answer, whose logits are kept"
    run = Run(answer.ids, answer.text, list(steps(answer.timings)), **times, total=now)
    return run, answer.logits, [box for look in answer.looks for box in look.boxes]


def _published(procedure: PublishedProcedure, *request: Any, **options: Any) -> tuple[Run, Tensor]:
    start = time.perf_counter()
    answer = procedure.ask(*request, **options)
    total = (time.perf_counter() - start) * 1e3
    assert answer.second_look_ms is not None, "a forced look is always taken"
    answered = (answer.rounds[-1].chosen_at[0] - start) * 1e3
    run = Run(answer.ids, answer.text, list(steps(answer.timings)), answered - answer.second_look_ms, answered, total)
    return run, torch.stack(answer.logits)


# The procedures count under their own names; `features` and the number of ViT calls of a stage say nothing to compare.
_COUNTS = {"tokens": "tokens", "token_forwards": "tokens", "lm_calls": "LM calls", "cache_copies": "cache copies"}
_COUNTS |= {"images": "images", "vit_patches": "patches", "vit_calls": "ViT calls"}


def steps(timings: Sequence[Any]) -> Iterator[Step]:
    """Yield the stages of a conversation, summed by name within the first and the second look."""
    looks: tuple[dict[str, Step], ...] = ({}, {})
    second = False
    for index, stage in enumerate(timings):
        # The first look ends with its prefill and, if the model said something, the decoding behind it.
        second = second or (index > 0 and timings[index - 1].name in ("prefill", "decode") and stage.name != "decode")
        found = looks[second]
        before = found.get(stage.name, Step(1 + second, stage.name, 0.0, {}))
        work = Counter(before.work)
        for name, count in stage.work.items():
            if name in _COUNTS and (name != "images" or stage.name == "crop+embed"):
                work[_COUNTS[name]] += count
        found[stage.name] = Step(1 + second, stage.name, before.milliseconds + stage.milliseconds, dict(work))
    yield from (step for found in looks for step in found.values())
