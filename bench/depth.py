"""A complete second look at true depth, stage by stage: `python -m bench.depth ours --weights int8 --look clip`.

One engine in one process: two of them are more than most machines hold, so rows are taken one after the other and not
in turn. `transformers` is its best way, its cache continued with explicit positions; its dtype is its weights' and its
arithmetic's. The photo, the question and the look are forced to be the same, the weights are random.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer

from bench.cases.engine import Continued, Problem, Recorder
from bench.environment import machine
from bench.transformers_model import transformers_model
from vpt_model.app.demo import QUESTION, default_image, steps
from vpt_model.app.terminal import resident_memory
from vpt_model.checkpoint import random_state, random_weights
from vpt_model.config import ENCODERS, PRESETS, ModelConfig
from vpt_model.engine import Engine
from vpt_model.engine.events import Clock, Done
from vpt_model.engine.requests import Append
from vpt_model.network.model import Model
from vpt_model.text.tokens import Tokenizer

TOKENS = 8
STAGES = ("tower", "prefill", "second tower", "perceive", "append", "token")
COLUMNS = ("engine", "weights", "look", "loaded", "GiB now / at most", *STAGES, "look, token to token", "first token")
Round = dict[str, float]
Ask = Callable[[str], Callable[[], tuple[Round, int]]]
"""Makes, of a look, a call that returns the seconds of each stage and the first token of the answer."""


def ours(config: ModelConfig, weights: str) -> Ask:
    stored = torch.float32 if weights == "float32" else torch.bfloat16
    model = Model.from_state(config, random_weights(config, dtype=stored), weights, consume=True)
    engine = Engine(model, Tokenizer.byte_level(config.vocab_size, config.kind))

    def ask(look: str) -> tuple[Round, int]:
        *_, done = engine.stream(default_image(), QUESTION, looks=[look], max_new_tokens=1 + TOKENS)
        assert isinstance(done, Done)
        found: Round = defaultdict(float)
        for step in steps(done.answer.timings):
            name = {"crop+embed": "tower", "ViT": "tower", "decode": "token"}.get(step.name, step.name)
            seconds = step.milliseconds / 1e3
            if step.look == 2:
                found["second tower" if name == "tower" else name] += (
                    seconds / step.work["tokens"] if name == "token" else seconds
                )
            elif name != "token":
                found[name] += seconds
        return found, done.answer.ids[0]

    return lambda look: partial(ask, look)


class Peer(Problem):
    """What `Continued` needs of a problem; chunks and positions come from a model of one layer, which are the same."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.look, self.photo, self.question, self.device = "", default_image(), QUESTION, "cpu"
        thin = replace(config, num_hidden_layers=1, vision=replace(config.vision, depth=1))
        tokenizer = Tokenizer.byte_level(config.vocab_size, config.kind)
        model = Model.from_state(thin, random_weights(thin, dtype=torch.bfloat16), "int8", consume=True)
        self.engine = Engine(model, tokenizer)
        self.engine.executor = Recorder(self.engine.executor)  # type: ignore[assignment]
        self.before, self.stages = 0, {}
        self.state = random_state(config, dtype=dtype)
        self.twin = transformers_model(config, self.state, tokenizer.ids.image_pad, tokenizer.ids.vision_start)


def transformers(config: ModelConfig, weights: str) -> Ask:
    from transformers import DynamicCache

    peer = Peer(config, getattr(torch, weights))
    twin: Any = peer.twin

    def ask(way: Continued, first: Append) -> tuple[Round, int]:
        found: Round = defaultdict(float)
        width, height = way.problem.photo.size
        begin = time.perf_counter()
        features = way._see([(0, 0, width, height)])
        found["tower"], begin = time.perf_counter() - begin, time.perf_counter()
        kept, way.cache = way.cache, DynamicCache(config=twin.config.get_text_config())
        twin.lm_head(way._forward(first, way._embed(first.tokens, features)))
        found["prefill"], way.cache = time.perf_counter() - begin, kept
        way.clock = Clock(torch.device("cpu"))
        token = answer = int(way.look().argmax())
        for stage in way.clock.stages:
            name = "second tower" if stage.name in ("crop+embed", "ViT") else stage.name
            found[name] += stage.milliseconds / 1e3
        begin, place = time.perf_counter(), int(way.second[-1].positions.max())
        for number in range(TOKENS):
            at = replace(way.second[-1], positions=torch.full((3, 1), place + 1 + number))
            token = int(twin.lm_head(way._forward(at, way._embed([token]))).argmax())
        found["token"] = (time.perf_counter() - begin) / TOKENS
        way.forget()
        return found, answer

    def made(look: str) -> Callable[[], tuple[Round, int]]:
        if look in ("dino", "sam"):
            raise typer.BadParameter(f"--look {look}: transformers' Qwen2-VL has no such re-encoder")
        peer.look = look
        way = Continued(peer)
        return partial(ask, way, peer.engine.executor.fed[0])

    return made


ENGINES: dict[str, Callable[[ModelConfig, str], Ask]] = {"ours": ours, "transformers": transformers}


@torch.inference_mode()
def main(
    engine: Annotated[str, typer.Argument(help=f"One of {', '.join(ENGINES)}.")] = "ours",
    preset: Annotated[str, typer.Option(help="2b or 7b; smaller ones for a try.")] = "2b",
    weights: Annotated[str, typer.Option(help="As `vpt ask` takes them; of transformers its dtype.")] = "bfloat16",
    look: Annotated[list[str] | None, typer.Option(help="As of `vpt ask`; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed, behind one that is not.")] = 3,
) -> None:
    """Print one row a look: seconds of each stage, medians of all rounds, and the memory of the whole process."""
    print(f"{machine()}, {torch.get_num_threads()} threads, {preset}, medians of {rounds}, seconds")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    groups: dict[str, list[str]] = {}
    for one in look or ["clip"]:
        groups.setdefault(ENCODERS.get(one, ENCODERS["clip"]), []).append(one)
    for kind, looks in groups.items():
        begin = time.perf_counter()
        made = ENGINES[engine](replace(PRESETS[preset], kind=kind), weights)
        loaded = time.perf_counter() - begin
        for one in looks:
            ask = made(one)
            ask()
            found = [ask() for _ in range(rounds)]
            middle = {stage: median(times.get(stage, 0.0) for times, _ in found) for stage in STAGES}
            whole = sum(middle[stage] for stage in ("second tower", "perceive", "append"))
            memory = " / ".join(f"{count / 2**30:.2f}" for count in resident_memory().values())
            shown = [f"{middle[stage]:.3f}" if middle[stage] else "" for stage in STAGES]
            cells = [engine, weights, one, f"{loaded:.1f}", memory, *shown, f"{whole:.3f}", str(found[0][1])]
            print("| " + " | ".join(cells) + " |", flush=True)
        del made, ask
        gc.collect()


if __name__ == "__main__":
    typer.run(main)
