"""The engine in bfloat16 on weights drawn on the device: `python -m bench.gpu.engine decode|looks|profile PRESET`.

decode: seconds to warm up; per token by the wall clock, between events, and of a replay alone, beside the time in
which the weights could be copied. looks: from the token that ends the round to the first answer token. profile: what a
replay consists of.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import WrongResult
from bench.gpu import DEVICE, REHEARSAL, record
from bench.gpu.timing import copy_bandwidth, device_seconds, synchronize
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import ENCODERS, PRESETS, ModelConfig
from vpt_model.engine import Engine
from vpt_model.engine.events import Look, Token
from vpt_model.engine.graphs import Bucket, Step, smallest
from vpt_model.network.language import LanguageModel
from vpt_model.network.model import Model
from vpt_model.network.state import State
from vpt_model.text.tokens import Tokenizer

LOOKS = {
    "clip": {"clip": "clip", "region, 54 tokens": "region:x3,y3,x3,y3", "region, 252 tokens": "region:x2,y1,x5,y4"},
    "dino": {"dino": "dino"},
    "sam": {"sam": "sam"},
}
TOKENS, TIMES = (4, 1) if REHEARSAL else (64, 7)
GATED = 4
PHOTO = (96, 128, 3) if REHEARSAL else (872, 1000, 3)
QUESTION = "What is in the picture?"


def preset_of(name: str) -> ModelConfig:
    return PRESETS["tiny" if REHEARSAL else name]


def drawn(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return random weights that keep activations of order one, made where they are used."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    state = {}
    for name, shape in expected_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=DEVICE).normal_(generator=generator)
        if name.endswith("bias") or len(shape) == 1:
            state[name] = tensor.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
        else:
            state[name] = tensor.mul_(torch.Size(shape[1:]).numel() ** -0.5)
    return state


def engine_of(preset: str, encoder: str) -> Engine:
    config = replace(preset_of(preset), kind=ENCODERS[encoder])
    tokenizer = Tokenizer.byte_level(config.vocab_size, config.kind)
    return Engine(Model.from_state(config, drawn(config)), tokenizer, longest_edge=512, capacity=2048)


def photo() -> Tensor:
    return torch.randint(0, 256, PHOTO, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def gate(engine: Engine, preset: str, tokens: int = 48) -> None:
    """Hold bfloat16 logits against float32 of the same weights: an error bound, and the same choice where it is clear.

    Raises WrongResult; nothing is timed then.
    """
    state = {name: x.float() for name, x in drawn(engine.model.config).items() if name.startswith(("model.", "lm_"))}
    ids = torch.arange(3, 3 + tokens)
    positions = torch.arange(tokens).expand(3, -1)
    logits = []
    for language in (engine.model.language, LanguageModel(engine.model.config, State(state))):
        hidden = language.forward(language.embed(ids), positions, [language.new_cache(tokens)], [tokens])
        logits.append(language.logits(hidden))
    ours, exact = logits
    error = ((ours - exact).norm() / exact.norm()).item()
    top = exact.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 2 * (ours - exact).abs().max()
    same = ours.argmax(1) == exact.argmax(1)
    agreement = same.float().mean().item()
    record("gate", preset=preset, error=error, top1=agreement, clear=int(clear.sum()), tokens=tokens)
    if not error <= 0.05 or not bool(same[clear].all()) or agreement < 0.7:
        raise WrongResult(f"bfloat16 against float32: error {error:.2e}, the same token at {agreement:.0%}; not timed")


@contextmanager
def without_stops(engine: Engine) -> Iterator[None]:
    """Let no token stop a row: random weights may choose to, and what is timed is a number of tokens."""
    with mock.patch.object(engine.loop, "ids", replace(engine.ids, stop=frozenset())):
        yield


def answered(engine: Engine, looks: list[str] | None = None) -> list[Tensor]:
    """Return the logits behind each of the first tokens of an answer, that of the last look where there are looks."""
    with without_stops(engine):
        return engine.ask(photo(), QUESTION, looks=looks, max_new_tokens=GATED, keep_logits=True).logits


def gate_replay(preset: str, replay: str, replayed: list[Tensor], eager: list[Tensor]) -> None:
    """Hold logits of replayed graphs against those of the same engine before it had any, as far as both choose alike.

    Raises WrongResult; nothing is timed then.
    """
    error, same = 0.0, 0
    for ours, theirs in zip(replayed, eager, strict=True):
        error = max(error, ((ours - theirs).norm() / theirs.norm()).item())
        if int(ours.argmax()) != int(theirs.argmax()):
            break
        same += 1
    record("gate", preset=preset, replay=replay, error=error, same=f"{same} of {len(eager)}")
    if not error <= 0.05:
        raise WrongResult(f"{replay}: replayed logits differ by {error:.2e} from those without graphs; not timed")


def decode(preset: str) -> None:
    engine = engine_of(preset, "clip")
    gate(engine, preset)
    eager = answered(engine)
    begin = time.perf_counter()
    engine.warm_up()
    synchronize()
    record("warm-up", preset=preset, seconds=time.perf_counter() - begin)
    gate_replay(preset, "decode", answered(engine), eager)
    wall, events = _token_seconds(engine)
    replay = _replay_seconds(engine, Bucket(1, 1, True))
    layers = [tensor for layer in engine.model.language.layers for tensor in vars(layer).values()]
    weights = sum(x.nbytes for x in [*layers, engine.model.language.head] if isinstance(x, Tensor))
    bandwidth = copy_bandwidth()
    record(
        "decode",
        preset=preset,
        dtype="bfloat16",
        wall_ms=wall * 1e3,
        events_ms=events * 1e3,
        replay_ms=replay * 1e3,
        weight_bytes=weights,
        copy_GB_per_s=bandwidth / 1e9,
        of_copy=weights / replay / bandwidth,
    )


def _token_seconds(engine: Engine) -> tuple[float, float]:
    """Return seconds per decoded token, by the wall clock and between two events of the stream."""
    for _ in range(2):
        times, marks = [], []
        with without_stops(engine):
            for event in engine.stream(photo(), QUESTION, max_new_tokens=TOKENS + 1):
                if isinstance(event, Token):
                    times.append(time.perf_counter())
                    if DEVICE == "cuda":
                        marks.append(torch.cuda.Event(enable_timing=True))
                        marks[-1].record()
    synchronize()
    count = len(times) - 1
    wall = (times[-1] - times[0]) / count
    return wall, marks[0].elapsed_time(marks[-1]) / 1e3 / count if marks else wall


def _step(engine: Engine, bucket: Bucket) -> Any:
    """Return what runs a bucket, always at the same place: the replay of its graph, or on a CPU the step itself."""
    if DEVICE == "cuda":
        steps = engine.executor.graphs.steps
        step = steps[smallest(steps, *bucket)]
        return standing(step, step.graph.replay)
    from vpt_model.engine.graphs import Graphs

    (step,) = Graphs(engine.model, 512, 1, [bucket]).steps.values()
    step.upload(())
    return step.run


def standing(step: Step, run: Callable[[], object]) -> Callable[[], Any]:
    """Return `run` behind a copy of a few bytes: a step that decodes leaves the integers of the next one."""
    place = step.device.block.clone()

    def again() -> object:
        step.device.block.copy_(place)
        return run()

    return again


@torch.inference_mode()
def _replay_seconds(engine: Engine, bucket: Bucket) -> float:
    return device_seconds(_step(engine, bucket), calls=2 if REHEARSAL else 20)[0]


def looks(preset: str) -> None:
    for encoder, answers in LOOKS.items():
        engine = engine_of(preset, encoder)
        eager = {name: answered(engine, [answer]) for name, answer in answers.items()}
        engine.warm_up()
        for name, answer in answers.items():
            gate_replay(preset, name, answered(engine, [answer]), eager[name])
            seconds = [_look_seconds(engine, answer) for _ in range(TIMES + 1)][1:]
            milliseconds = sorted(1e3 * one for one in seconds)
            median = statistics.median(milliseconds)
            record("look", preset=preset, look=name, ms=median, low=milliseconds[0], high=milliseconds[-1])
        del engine
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def _look_seconds(engine: Engine, answer: str) -> float:
    """Return seconds from the token that ends the round to the first answer token, each as the caller sees it.

    With logits kept, forced tokens are fed one by one, as those that a model chooses are: what `bench.launches` counts.
    """
    begin, looked = 0.0, False
    for event in engine.stream(photo(), QUESTION, looks=[answer], max_new_tokens=1, keep_logits=True):
        if isinstance(event, Token) and looked:
            return time.perf_counter() - begin
        if isinstance(event, Token):
            begin = time.perf_counter()
        looked |= isinstance(event, Look)
    raise WrongResult(f"the look {answer!r} was not taken: nothing to time")


class RecordingProfiler:
    """Stands for torch's profiler in a rehearsal: the device's table cannot be had, that it was asked for can."""

    def __init__(self, **asked: Any) -> None:
        self.asked = asked

    def __enter__(self) -> RecordingProfiler:
        return self

    def __exit__(self, *error: object) -> None: ...

    def key_averages(self) -> RecordingProfiler:
        return self

    def table(self, **asked: Any) -> str:
        return f"rehearsal: no profile; asked for {sorted(self.asked)} and {sorted(asked)}"


@torch.inference_mode()
def profile(preset: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    engine = engine_of(preset, "clip")
    engine.warm_up()
    with without_stops(engine):  # so that buffers hold a conversation
        for _ in engine.stream(photo(), QUESTION, max_new_tokens=4):
            pass
    calls = {"decode": _step(engine, Bucket(1, 1, True)), "append": _step(engine, Bucket(1, 320, True))}
    box = (0, 0, 0, PHOTO[1], PHOTO[0])
    image = photo().to(DEVICE)
    calls["tower"] = lambda: engine.model.vision.look([image], [box], engine.loop.policy)
    for name, call in calls.items():
        call()
        synchronize()
        with (RecordingProfiler if REHEARSAL else profiler)(activities=[ProfilerActivity.CUDA]) as found:
            call()
            synchronize()
        record(
            "profile",
            preset=preset,
            of=name,
            table=found.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70),
        )


if __name__ == "__main__":
    {"decode": decode, "looks": looks, "profile": profile}[sys.argv[1]](sys.argv[2])
