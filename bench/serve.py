"""`python -m bench serve`: vLLM with second looks under load, its clients being real HTTP streams.

A server runs on vpt-mini, or on random weights of `2b-slice` that are made to ask for looks token by token. Closed
loop: C clients, each with one request at a time; open loop: requests arrive by a Poisson process at 70 % of the rate
that 16 clients reach. Paths are mixed. Against the way people look at a region today (a first request, the crop made by
the client, a second request with it; the same server, its prefix cache on), and against `vpt_model.Engine`. Nothing is
judged by these figures: mini's are Python overhead of a tiny model, and on a machine of few cores server, clients and
model share them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import ROOT, commit, machine
from bench.scripted import NAME, SCRIPT
from bench.vllm_server import served, user

CLIENTS = (1, 4, 16, 64)
OPEN = 0.7
"""Of the rate of 16 clients in the closed loop."""
PERCEPTION = re.compile(r"<\|(?:region_token_end|(?:clip|detection|seg)_action_start)\|>")
REGION = re.compile(r"<\|x_(\d)\|><\|y_(\d)\|><\|x_(\d)\|><\|y_(\d)\|>")


@dataclass(frozen=True)
class Ask:
    """A question.

    is_about_region: whether a region is what it takes to answer. answer: the right one, where there is one. turns: ids
    of each turn, for weights that say nothing of their own. look: what they ask for, in the syntax of `Engine.stream`.
    """

    pixels: np.ndarray
    text: str
    is_about_region: bool
    answer: str | None = None
    turns: tuple[list[int], ...] = ()
    look: str | None = None

    def options(self, turns: slice = slice(None), **options: Any) -> dict[str, Any]:
        """Return the fields of a request that is answered with these turns."""
        if script := sum(self.turns[turns], start=[]):
            options |= {SCRIPT: script, NAME: uuid.uuid4().hex}
        return {"vllm_xargs": options} if options else {}


@dataclass
class Seen:
    """What a client saw: seconds from the request on; `look` from the token that asks to the first behind it."""

    first: float = 0.0
    end: float = 0.0
    look: float | None = None
    tokens: int = 0
    text: str = ""


@dataclass
class Load:
    """The outcome of one load."""

    seconds: float = 0.0
    seen: list[Seen] = field(default_factory=list)
    lost: int = 0

    def add(self, other: Load) -> None:
        """Take another outcome of the same load in."""
        self.seconds, self.lost = self.seconds + other.seconds, self.lost + other.lost
        self.seen += other.seen

    def row(self) -> dict[str, Any]:
        """Return figures of a table: rates per second, times in milliseconds."""
        looks = [each.look for each in self.seen if each.look is not None]
        tokens = sum(each.tokens for each in self.seen)
        return {
            "requests": len(self.seen),
            "lost": self.lost,
            "requests/s": round(len(self.seen) / self.seconds, 2),
            "tokens/s": round(tokens / self.seconds, 1),
            "first token p50": _ms([each.first for each in self.seen], 50),
            "first token p99": _ms([each.first for each in self.seen], 99),
            "look p50": _ms(looks, 50),
            "look p99": _ms(looks, 99),
        }


def _ms(values: Sequence[float], percent: int) -> float | None:
    """Return a percentile in milliseconds; None of nothing."""
    if not values:
        return None
    return round(1e3 * (statistics.quantiles(values, n=100)[percent - 1] if len(values) > 1 else values[0]), 1)


async def streamed(client: Any, messages: list[Any], **options: Any) -> AsyncIterator[tuple[float, str, int]]:
    """Time, text and tokens of each piece of an answer."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 48, "stream": True, "skip_special_tokens": False}
    body["stream_options"] = {"include_usage": True}
    async with client.stream("POST", "/v1/chat/completions", json=body | options) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                part = json.loads(line[6:])
                for choice in part["choices"]:
                    if text := choice["delta"].get("content"):
                        yield time.perf_counter(), text, 0
                if part.get("usage"):
                    yield time.perf_counter(), "", part["usage"]["completion_tokens"]


async def ask(client: Any, asked: Ask) -> Seen:
    """Ask one question of a server that looks by itself."""
    return await _watched(client, [user(asked.text, asked.pixels)], asked.options())


async def _watched(client: Any, messages: list[Any], options: dict[str, Any]) -> Seen:
    seen, began, asking = Seen(), time.perf_counter(), None
    async for now, text, tokens in streamed(client, messages, **options):
        seen.tokens += tokens
        if not text:
            continue
        seen.first = seen.first or now - began
        if asking is not None and seen.look is None and not text.startswith("<|im_end|>"):
            seen.look = now - asking
        seen.text += text
        if PERCEPTION.search(text):
            asking = now
        seen.end = now - began
    return seen


async def ask_twice(client: Any, asked: Ask) -> Seen:
    """Look at a region as people do today: the client reads the box, cuts it out and asks a second time."""
    messages, began = [user(asked.text, asked.pixels)], time.perf_counter()
    first = await _watched(client, messages, asked.options(slice(1), vpt_max_looks=0))
    found = REGION.findall(first.text)
    if not found:
        return first
    asking, height, width = time.perf_counter(), *asked.pixels.shape[:2]
    crops = []
    for x0, y0, x1, y1 in (map(int, cells) for cells in found):
        left, top = max(x0 - 1, 0) * width // 8, max(y0 - 1, 0) * height // 8
        right, bottom = min(x1 + 2, 8) * width // 8, min(y1 + 2, 8) * height // 8
        crops.append(asked.pixels[top:bottom, left:right])
    said = {"role": "assistant", "content": first.text.removesuffix("<|im_end|>")}
    options = asked.options(slice(1, None), vpt_max_looks=0)
    second = await _watched(client, [*messages, said, user("", *crops)], options)
    look = time.perf_counter() - asking - second.end + second.first if second.first else None
    return Seen(first.first, time.perf_counter() - began, look, first.tokens + second.tokens, second.text)


async def closed_loop(address: str, asks: Sequence[Ask], clients: int, question: Any = ask) -> Load:
    """Let `clients` clients share the questions, each with one request at a time."""
    waiting, load = list(asks), Load()

    async def one(client: Any) -> None:
        while waiting:
            asked = waiting.pop(0)
            try:
                load.seen.append(await question(client, asked))
            except Exception:
                load.lost += 1

    async with http(address) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
    load.seconds = time.perf_counter() - began
    return load


async def in_turn(address: str, asks: Sequence[Ask], clients: int) -> dict[str, Load]:
    """Ask half of the questions by second looks and half by second requests, in turn: the machine's speed changes."""
    ways, per = {"second look": ask, "second request": ask_twice}, max(clients, 2)
    loads = {name: Load() for name in ways}
    for first in range(0, len(asks), 2 * per):
        for place, (name, way) in enumerate(ways.items()):
            start = first + place * per
            part = await closed_loop(address, asks[start : start + per], clients, way)
            loads[name].add(part)
    return loads


async def open_loop(address: str, asks: Sequence[Ask], rate: float) -> Load:
    """Let questions arrive `rate` times a second on average, whether the server keeps up or not."""
    draw, load = np.random.default_rng(1), Load()
    began = time.perf_counter()

    async def one(client: Any, asked: Ask, after: float) -> None:
        await asyncio.sleep(after)
        try:
            load.seen.append(await ask(client, asked))
        except Exception:
            load.lost += 1

    async with http(address) as client:
        times = draw.exponential(1 / rate, len(asks)).cumsum()
        await asyncio.gather(*(one(client, asked, float(after)) for asked, after in zip(asks, times)))
    load.seconds = time.perf_counter() - began
    return load


async def soak(address: str, pid: int, asks: Sequence[Ask], requests: int, clients: int = 16) -> dict[str, Any]:
    """Send requests, a fifth of which goes away in the middle: right answers, what is left over, memory on the way."""
    draw, numbers, right, told, left, lost = np.random.default_rng(2), iter(range(requests)), 0, 0, 0, 0
    memory = [resident(pid)]

    async def one(client: Any) -> None:
        nonlocal right, told, left, lost
        for number in numbers:
            asked, leaves = asks[number % len(asks)], draw.random() < 0.2
            try:
                text, pieces = "", int(draw.integers(0, 8))
                async for _, piece, _ in streamed(client, [user(asked.text, asked.pixels)]):
                    text += piece
                    if leaves and (pieces := pieces - 1) < 0:
                        left += 1
                        break
                else:
                    told += 1
                    right += text.removesuffix("<|im_end|>").endswith(str(asked.answer))
            except Exception:
                lost += 1
            if number % max(requests // 10, 1) == 0:
                memory.append(resident(pid))

    async with http(address) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
        # Until the engine core has heard that the last clients are gone.
        await asyncio.sleep(2)
        metrics = (await client.get("/metrics")).text
    memory.append(resident(pid))
    busy = {name: _total(metrics, f"vllm:{name}") for name in ("num_requests_running", "num_requests_waiting")}
    return {
        "requests": requests,
        "told": told,
        "right": right,
        "went away": left,
        "lost": lost,
        "left over": busy | {"kv_cache_usage": _total(metrics, "vllm:kv_cache_usage_perc")},
        "looks": _total(metrics, "vllm:vpt_look_seconds_count"),
        "MiB on the way": memory,
    }


def _total(metrics: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE))


def resident(pid: int) -> int:
    """Return the memory of a process and all below it, in MiB."""
    pages = 0
    for each in [pid, *_below(pid)]:
        try:
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
        except OSError:  # it has just ended
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def _below(pid: int) -> list[int]:
    try:
        text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    return [found for child in map(int, text.split()) for found in (child, *_below(child))]


def http(address: str) -> Any:
    """Return a client without limits of its own."""
    import httpx

    return httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None))


def mini_asks() -> Iterator[Ask]:
    """Yield questions of every kind without end: regions, re-encoding and direct answers are mixed."""
    from vpt_model.mini.scenes import KINDS, make_question, make_scene

    for seed in count():
        scene = make_scene(seed, "test")
        for question in (make_question(scene, kind, seed) for kind in KINDS):
            yield Ask(scene.pixels, question.text, "tag" in question.text, question.answer)


def slice_asks() -> Iterator[Ask]:
    """Yield questions about noise; the model is made to ask for a region, for a re-encoding, and for nothing."""
    from vpt_model import PRESETS
    from vpt_model.text.tokens import Tokenizer, parse_look

    config, draw = PRESETS["2b-slice"], np.random.default_rng(3)
    tokenizer = Tokenizer.byte_level(config.vocab_size, config.kind)
    answer = [*tokenizer.encode("an answer of 24 letters."), tokenizer.ids.im_end]
    for number in count():
        pixels = draw.integers(0, 256, (384, 512, 3), dtype=np.uint8)
        look = ("region:x2,y2,x4,y4", "clip", None)[number % 3]
        turns = (answer,) if look is None else (parse_look(look, tokenizer.ids), answer)
        yield Ask(pixels, f"what is it {number}?", number % 3 == 0, None, turns, look)


def slice_folder(folder: Path) -> Path:
    """Return a checkpoint of random float32 weights in the shapes of `2b-slice`, made where it is missing."""
    from safetensors.torch import save_file

    from vpt_model import PRESETS, mini
    from vpt_model.checkpoint import random_state
    from vpt_model.text.tokens import Tokenizer

    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = PRESETS["2b-slice"]
    tokenizer, state = Tokenizer.byte_level(config.vocab_size, config.kind), random_state(config)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    ids, fields = tokenizer.ids, json.loads((mini.FOLDER / "config.json").read_text())
    fields |= {name: value for name, value in vars(config).items() if name in fields and name != "vision_config"}
    fields["vision_config"] |= vars(config.vision)
    fields["rope_scaling"]["mrope_section"] = list(config.mrope_section)
    fields |= {"image_token_id": ids.image_pad, "vision_start_token_id": ids.vision_start, "torch_dtype": "float32"}
    fields |= {"vision_end_token_id": ids.vision_end, "para_start_id": ids.im_start, "para_end_id": ids.im_end}
    fields |= {"clip_image_token_id": ids.kind_pad, "clip_action_start_id": ids.action_start}
    fields |= {"clip_action_id": ids.action}
    for name in ("tokenizer_config.json", "generation_config.json"):
        content = json.loads((mini.FOLDER / name).read_text())
        if "eos_token_id" in content:
            content |= {"eos_token_id": [ids.im_end, ids.endoftext], "pad_token_id": ids.endoftext}
        (folder / name).write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def engine_looks(folder: Path, asks: Sequence[Ask]) -> list[float]:
    """Return seconds from the token that asks to the first behind the look, in our engine, one question at a time."""
    from vpt_model import Engine, mini
    from vpt_model.engine.events import Reencode, Region, Token

    engine, times = Engine(*mini.load(folder=folder)), []
    for asked in asks:
        asking, looks = None, [asked.look] if asked.look else None
        for event in engine.stream(asked.pixels, asked.text, looks=looks):
            if isinstance(event, (Region, Reencode)):
                asking = time.perf_counter()
            elif isinstance(event, Token) and asking is not None:
                times.append(time.perf_counter() - asking)
                asking = None
                if asked.turns:
                    break  # random weights do not come to an end
    return times


def planned(asks: Iterator[Ask], requests: int) -> dict[str, Any]:
    """Return the loads by name, each a function of the server's address and the rate of an open loop.

    No picture comes twice: its features would be cached. The loads at regions have as many requests of either way, or
    half as many with one client.
    """
    regions = (asked for asked in asks if asked.is_about_region)
    loads: dict[str, Any] = {}

    def closed(clients: int) -> Any:
        asked = take(asks, max(requests, clients))
        return lambda address, _: closed_loop(address, asked, clients)

    def both_ways(clients: int) -> Any:
        asked = take(regions, 2 * max(requests // 2, 2 * clients))
        return lambda address, _: in_turn(address, asked, clients)

    for clients in CLIENTS:
        loads[f"closed, {clients} clients"] = closed(clients)
    arriving = take(asks, requests)
    loads["open"] = lambda address, rate: open_loop(address, arriving, rate)
    for clients in (1, 16):
        loads[f"regions, {clients} clients"] = both_ways(clients)
    return loads


def take(asks: Iterator[Ask], number: int) -> list[Ask]:
    """Return the next questions."""
    return list(islice(asks, number))


def measure(model: str, requests: int, soaked: int, parallel: Sequence[int], out: Path) -> dict[str, Any]:
    """Run every load on one model and write the figures to `out` as they come; what stands there is not run again.

    model: "mini" or "2b-slice". requests: of each load, and no fewer than its clients. soaked: requests of the
    endurance run, on mini and one engine alone. parallel: engines side by side, a server each. Raises ValueError where
    `out` holds figures of another model, machine, commit or number of requests.
    """
    from vpt_model import mini

    is_mini = model == "mini"
    folder = mini.FOLDER if is_mini else slice_folder(ROOT / "build" / model)
    asks = mini_asks() if is_mini else slice_asks()
    first, endless, lone = take(asks, 8), take(asks, 128 * is_mini), take(asks, requests)
    head = {"model": model, "machine": machine(), "commit": commit(), "requests": requests}
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {**head, "servers": {}}
    if began := {name: found[name] for name in head if found[name] != head[name]}:
        raise ValueError(f"{out} was begun with {began}, and this is {head}: move it away")
    loads = planned(asks, requests)
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        out.write_text(json.dumps(found, indent=1) + "\n")

    async def drive(address: str, rows: dict[str, Any]) -> None:
        await closed_loop(address, first, 4)  # warm
        for name, load in loads.items():
            if any(row.startswith(name) for row in rows):
                continue
            rate = OPEN * rows["closed, 16 clients"]["requests/s"] if name == "open" else 0.0
            outcome = await load(address, rate)
            for way, each in (outcome if isinstance(outcome, dict) else {"": outcome}).items():
                rows[f"{name}{way and ': '}{way}"] = each.row() | {"offered/s": round(rate, 2)}
            keep()

    async def endure(address: str, pid: int) -> None:
        found["soak"] = await soak(address, pid, endless, soaked)
        keep()

    for engines in parallel:
        rows = found["servers"].setdefault(str(engines), {})
        soaks = is_mini and engines == 1 and bool(soaked) and "soak" not in found
        if not soaks and all(any(row.startswith(name) for row in rows) for name in loads):
            continue
        flags = ["--data-parallel-size", str(engines)] if engines > 1 else []
        flags += [] if is_mini else ["--logits-processors", "bench.scripted:Scripted"]
        with served(folder, out.with_suffix(f".{engines}.log"), *flags) as (address, pid):
            asyncio.run(drive(address, rows))
            if soaks:
                asyncio.run(endure(address, pid))
    if "engine" not in found:
        times = engine_looks(folder, lone)
        found["engine"] = {"looks": len(times), "look p50": _ms(times, 50), "look p99": _ms(times, 99)}
        keep()
    return found
