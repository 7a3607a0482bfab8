"""The scheduler with a simulated worker: what a model runner does with a scheduler's output, on token ids alone.

The worker keeps a paged cache of ids and "generates" a script as a pure function of the ids that it reads back through
the block table. A wrong block, a stale write, a lost or doubled token, a rewind into a block that is cached, or a
capture behind another context: each changes what is generated.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.serving.engines import nothing_left
from vpt_model.text.prompt import action_round, first_round, region_round
from vpt_model.text.tokens import crop_box, parse_region_ids
from vpt_model.vllm.items import AGAIN, CONTROL, FEATURES, PIXELS
from vpt_model.vllm.options import MAX_LOOKS, SLOT
from vpt_model.vllm.perception import Perception, image_grid, image_tokens, reencoded_tokens

BLOCK = 32
JUNK = (65, 66, 67)
"""What is sampled behind a turn's end: too early by a step that was planned ahead, or where nothing is used."""


@dataclass
class Script:
    """A conversation as it must be: its turns, all its tokens in order, and where each round starts."""

    name: str
    prompt: list[int]
    pixels: torch.Tensor
    max_looks: int
    turns: list[list[int]]
    whole: list[int]
    round_starts: list[int]

    @property
    def told(self) -> list[int]:
        """What the client must see."""
        return [token for turn in self.turns for token in turn]

    def next_token(self, seen: list[int], action_start: int) -> int:
        """What the model says to these tokens. Raises AssertionError if they are not this conversation."""
        at = max(i for i, start in enumerate(self.round_starts) if seen[:start] == self.whole[:start])
        said, turn = seen[self.round_starts[at] :], self.turns[at]
        if said == turn[: len(said)]:
            return turn[len(said)] if len(said) < len(turn) else JUNK[0]
        if said == [action_start]:
            return JUNK[1]
        assert said[: len(turn)] == turn, f"{self.name} reads {said} in this round, its turn is {turn}"
        return JUNK[2]


def write_script(number: int, perception: Perception, draw: random.Random) -> Script:
    """A random conversation about a random size of picture."""
    ids, encode = perception.tokenizer.ids, perception.tokenizer.encode
    start = ids.action_start

    def region() -> list[int]:
        (left, right), (top, bottom) = (sorted(draw.sample(range(8), 2)) for _ in "xy")
        return list(ids.region_span(left, top, right, bottom))

    lead = encode(draw.choice(("", "", "look: ", "hm ")))
    answer = [*encode(draw.choice(("yes", "forty two", "no idea whatsoever"))), ids.im_end]
    max_looks, turns = draw.choice(
        [
            (1, [answer]),
            (1, [[*lead, *region(), ids.im_end], answer]),
            (1, [[*region(), *region(), ids.im_end], answer]),
            (1, [[*lead, start], answer]),
            (1, [[*lead, ids.action, *encode("so "), start], answer]),
            (3, [[start], [*region(), ids.im_end], [*lead, start], answer]),
            (0, [[*region(), ids.im_end]]),
        ]
    )
    height, width = draw.randint(60, 700), draw.randint(60, 700)
    user = encode(f"\nquestion {number % 5}")
    count = image_tokens(perception.config, height, width)
    prompt = first_round(ids, encode("You are a helpful assistant."), user, count)
    whole, round_starts = list(prompt), [len(prompt)]
    for turn in turns[:-1]:
        if turn[-1] == start:
            whole += [start, *action_round(ids, reencoded_tokens(perception.config, height, width))]
        else:
            boxes = [crop_box(span, width, height) for span in parse_region_ids(turn, ids)]
            counts = [image_tokens(perception.config, bottom - top, right - left) for left, top, right, bottom in boxes]
            whole += turn[:-1] + region_round(ids, counts, encode)
        round_starts.append(len(whole))
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    return Script(f"conversation{number}", prompt, pixels, max_looks, turns, whole, round_starts)


@dataclass
class Row:
    """A request in the worker."""

    tokens: list[int]
    blocks: list[int]
    params: Any
    features: list[Any]
    prompt: int
    computed: int = 0


@dataclass
class Worker:
    """One model runner. second: by the rules of the second version, which forgets a request that is preempted.

    encoded: what each feature in the encoder's cache was made of: the name of the image's own features, and the tokens
    behind which its control state was captured, or None for an image or a crop. evicted: features that left the cache.
    again: images of which the own features had to be computed another time for a look.
    """

    scripts: dict[str, Script]
    action_start: int
    second: bool
    cache: dict[tuple[int, int], tuple[int, str | None]] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    encoded: dict[str, tuple[list[int], list[int] | None]] = field(default_factory=dict)
    controls: dict[int, list[int]] = field(default_factory=dict)
    captured: int = 0
    fed: int = 0
    again: int = 0
    evicted: int = 0

    def step(self, plan: Any) -> dict[str, list[int]]:
        """Carry a scheduler's output out: the tokens sampled for each request."""
        gone = [*plan.finished_req_ids, *((plan.preempted_req_ids or ()) if self.second else ())]
        for name in gone:
            self.rows.pop(name, None)
        for name in plan.free_encoder_mm_hashes:
            self.evicted += self.encoded.pop(name, None) is not None
        for new in plan.scheduled_new_reqs:
            whole = new.prefill_token_ids if self.second and new.prefill_token_ids is not None else new.prompt_token_ids
            features, prompt = list(new.mm_features), len(new.prompt_token_ids)
            row = Row(
                list(whole), list(new.block_ids[0]), new.sampling_params, features, prompt, new.num_computed_tokens
            )
            self.rows[new.req_id] = row
        self._go_on(plan.scheduled_cached_reqs)
        for name, indices in plan.scheduled_encoder_inputs.items():
            for item in (self.rows[name].features[index] for index in indices):
                assert item.data and (PIXELS in item.data or AGAIN in item.data), f"{name} has lost its pixels"
                features, behind = item.data[FEATURES].data.tolist(), None
                if CONTROL in item.data:
                    slot, has_image = item.data[CONTROL].data.tolist()
                    behind = self.controls[slot]
                    self.again += has_image and features not in [kept for kept, _ in self.encoded.values()]
                self.encoded[item.identifier] = features, behind
        return {name: self._feed(name, count) for name, count in plan.num_scheduled_tokens.items()}

    def _go_on(self, known: Any) -> None:
        for index, name in enumerate(known.req_ids):
            row, blocks = self.rows[name], known.new_block_ids[index]
            row.computed = known.num_computed_tokens[index]
            if name in known.resumed_req_ids:
                row.blocks = list(blocks[0])
                del row.tokens[row.prompt + known.num_output_tokens[index] :]
                if name in known.all_token_ids and known.num_output_tokens[index]:
                    row.tokens = list(known.all_token_ids[name])
            elif blocks is not None:
                row.blocks += blocks[0]

    def _feed(self, name: str, count: int) -> list[int]:
        row, embedded = self.rows[name], dict[int, str]()
        begin, end = row.computed, row.computed + count
        assert end <= len(row.tokens), f"{name} is fed up to {end}, but has {len(row.tokens)} tokens"
        self.fed += count
        for item in row.features:
            place = item.mm_position
            if place.offset < end and place.offset + place.length > begin:
                assert item.identifier in self.encoded, f"{name} reads features that were not encoded"
                _, behind = self.encoded[item.identifier]
                assert behind in (None, row.tokens[: place.offset]), f"{name} reads another conversation's action"
            places = range(place.length) if place.is_embed is None else place.is_embed.nonzero().flatten().tolist()
            embedded |= {place.offset + i: item.identifier for i in places}
        for i in range(begin, end):
            self.cache[row.blocks[i // BLOCK], i % BLOCK] = row.tokens[i], embedded.get(i)
        if end < len(row.tokens):
            return []
        seen = [self.cache[row.blocks[i // BLOCK], i % BLOCK] for i in range(end)]
        names = {feature for _, feature in seen if feature is not None}
        assert names <= {item.identifier for item in row.features}, f"{name} reads another conversation's features"
        tokens = [token for token, _ in seen]
        if SLOT in (row.params.extra_args or {}):
            self.controls[row.params.extra_args[SLOT]] = tokens
            self.captured += 1
        row.tokens.append(self.scripts[name].next_token(tokens, self.action_start))
        return row.tokens[-1:]


@dataclass(frozen=True)
class Setting:
    """One simulation.

    blocks: of the cache. budget: tokens of a step. disturbed: how often a step brings a preemption; half as often an
    abort.
    """

    seed: int
    ahead: bool
    second: bool
    blocks: int = 400
    budget: int = 2048
    rows: int = 8
    disturbed: float = 0.02
    conversations: int = 24


@dataclass
class Outcome:
    """What became of the requests.

    told, finished: tokens and finish reasons by request. empty: the longest run of steps that scheduled nothing. gone:
    pictures whose features left the encoder's cache while their conversations might still look at them.
    """

    scheduler: Any
    worker: Worker
    told: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    empty: int = 0
    gone: int = 0


def look_scheduler_of(folder: Path, setting: Setting) -> Any:
    """The scheduler of an engine that serves `folder`, without the engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    options = {"max_model_len": 2048, "max_num_seqs": setting.rows, "max_num_batched_tokens": setting.budget}
    arguments = EngineArgs(str(folder), dtype="float32", enforce_eager=True, block_size=BLOCK, **options)
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = setting.ahead
    config.cache_config.num_gpu_blocks = setting.blocks
    layers = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(setting.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layers)])
    scheduler = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    scheduler.use_v2_model_runner = setting.second
    return scheduler


def requests_of(scripts: list[Script], perception: Perception) -> list[Any]:
    """The scripts as requests that have just reached the engine core."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from vpt_model.vllm.items import image_item

    hashing, ids = get_hash_fn_by_name("sha256"), perception.tokenizer.ids
    init_none_hash(hashing)
    hasher, requests = get_request_block_hasher(BLOCK, hashing), []
    for script in scripts:
        grid = image_grid(perception.config, *script.pixels.shape[:2])
        place = PlaceholderRange(script.prompt.index(ids.image_pad), script.prompt.count(ids.image_pad))
        item = image_item(script.pixels, grid)
        shown = MultiModalFeatureSpec(item, "image", f"picture of {script.name}", place, mm_hash=script.name)
        params = SamplingParams(temperature=0, max_tokens=400, extra_args={MAX_LOOKS: script.max_looks})
        requests.append(Request(script.name, script.prompt, params, None, mm_features=[shown], block_hasher=hasher))
    return requests


def simulate(folder: Path, setting: Setting) -> Outcome:
    """Run random conversations to their end, checking on the way what the worker reads."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    scheduler, draw = look_scheduler_of(folder, setting), random.Random(setting.seed)
    perception = scheduler.perception
    scripts = [write_script(number, perception, draw) for number in range(setting.conversations)]
    worker = Worker({script.name: script for script in scripts}, perception.tokenizer.ids.action_start, setting.second)
    outcome, planned, arriving = Outcome(scheduler, worker), deque[Any](), requests_of(scripts, perception)
    empty = 0
    for _ in range(4000):
        if not (arriving or planned or scheduler.has_unfinished_requests()):
            break
        if arriving and draw.random() < 0.5:
            scheduler.add_request(arriving.pop(0))
        if scheduler.running and draw.random() < setting.disturbed:
            preempt(scheduler, worker, draw.random() < 0.5)
        if scheduler.requests and draw.random() < setting.disturbed / 2:
            gone = draw.choice(list(scheduler.requests))
            scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
            outcome.aborted.add(gone)
        if scheduler.has_requests():
            live = {talk.image[0] for talk in scheduler.conversations.values() if talk.may_look}
            plan = scheduler.schedule()
            gone = live.intersection(plan.free_encoder_mm_hashes)
            outcome.gone += len(gone)
            if gone and not plan.preempted_req_ids:  # what a preemption frees comes behind them
                unused = set(scheduler.encoder_cache_manager.freeable)
                assert unused <= live, f"the features of live pictures {gone} go before {unused - live}"
            planned.append((plan, worker.step(plan)))
            empty = 0 if plan.total_num_scheduled_tokens else empty + 1
            outcome.empty = max(outcome.empty, empty)
        # One step is planned ahead while the one before it runs; nothing is left to plan where a step is empty.
        ahead = 2 if setting.ahead else 1
        drained = not scheduler.has_unfinished_requests() or empty > 0
        while planned and (len(planned) >= ahead or drained):
            plan, sampled = planned.popleft()
            names = list(plan.num_scheduled_tokens)
            result = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, [list(sampled[n]) for n in names])
            for outputs in scheduler.update_from_output(plan, result).values():
                for output in outputs.outputs:
                    outcome.told.setdefault(output.request_id, []).extend(output.new_token_ids)
                    if output.finish_reason is not None:
                        outcome.finished[output.request_id] = str(output.finish_reason)
    return outcome


def preempt(scheduler: Any, worker: Worker, everything: bool) -> None:
    """Preempt the last running request; or all of them, while every encoded image is forgotten."""
    while scheduler.running:
        scheduler._preempt_request(scheduler.running.pop(), time.monotonic())
        if not everything:
            return
    scheduler.encoder_cache_manager.reset()
    worker.encoded.clear()


def assert_right(outcome: Outcome) -> None:
    """Every client was told its conversation, whole unless it went away, and nothing is left over."""
    for name, script in outcome.worker.scripts.items():
        told = outcome.told.get(name, [])
        if name in outcome.aborted:
            assert told == script.told[: len(told)]
        else:
            assert told == script.told and name in outcome.finished, f"{name} was told {told}, not {script.told}"
    assert outcome.worker.captured
    nothing_left(outcome.scheduler)
