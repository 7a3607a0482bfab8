"""The engine's memory and work: what touches a cache, what stays alive, what a look costs however many came before."""

from __future__ import annotations

import gc
from collections import Counter, deque
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.inputs import random_image, tiny_model
from tests.model.watch import CacheTraffic, LiveMemory, tensors
from vpt_model.checkpoint import random_state
from vpt_model.config import ENCODERS, PRESETS
from vpt_model.engine import Engine
from vpt_model.engine.conversation import Conversation, Question
from vpt_model.engine.events import Answer, Clock, Done, Look
from vpt_model.engine.requests import Output
from vpt_model.engine.scheduler import Row, Scheduler
from vpt_model.network.model import Model
from vpt_model.text.tokens import Tokenizer, parse_look

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
REGION = "region:x2,y1,x5,y4"
LAYERS = PRESETS["tiny"].num_hidden_layers


def engine_of(encoder: str = "clip", **options) -> Engine:
    kind = ENCODERS[encoder]
    return Engine(tiny_model(kind), Tokenizer.byte_level(320, kind), **options)


def fed(answer: Answer) -> int:
    return sum(stage.work["tokens"] for stage in answer.timings if "tokens" in stage.work)


class TestCacheTraffic:
    @pytest.mark.parametrize("encoder", ENCODERS)
    @pytest.mark.parametrize("look", [REGION, "re-encode"])
    def test_only_appends_and_attention_touch_a_cache(self, encoder, look):
        engine = engine_of(encoder, max_looks=2)
        (cache,) = engine.pool.idle
        before = cache.keys.data_ptr(), cache.values.data_ptr()
        with CacheTraffic(engine.pool.idle) as traffic:
            looks = [encoder if look == "re-encode" else look] * 2
            answer = engine.ask(IMAGE, QUESTION, looks=looks, max_new_tokens=5)
        assert len(answer.looks) == 2 and traffic.other == []
        assert sum(traffic.appended) == LAYERS * fed(answer), "every token is written once per layer"
        assert len(traffic.read) == len(traffic.appended)
        assert (cache.keys.data_ptr(), cache.values.data_ptr()) == before and engine.pool.idle == [cache]

    def test_a_batch_writes_no_row_twice(self):
        engine = engine_of()
        engine.pool.idle = [engine.model.language.new_cache(engine.capacity) for _ in range(3)]
        with CacheTraffic(engine.pool.idle) as traffic:
            answers = engine.ask_batch([IMAGE] * 3, [QUESTION, "Why?", ""], looks=[[REGION], ["clip"], None])
        assert traffic.other == [] and sum(traffic.appended) == LAYERS * sum(map(fed, answers))

    @torch.inference_mode()
    def test_the_watcher_sees_copies(self):
        (cache,) = engine_of().pool.idle
        query, keys = torch.zeros(1, 4, 3, 32), cache.keys[0].transpose(0, 1)[None]
        for name, touch in (
            ("clone", lambda: cache.keys.clone()),
            ("cat", lambda: torch.cat([cache.values, cache.values])),
            ("copy_", lambda: cache.keys[:, 1:2].copy_(cache.keys[:, :1])),
            ("contiguous", lambda: cache.keys.transpose(1, 2).contiguous()),
            (
                "composed attention",
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    query, keys, keys, dropout_p=0.5, enable_gqa=True
                ),
            ),
        ):
            with CacheTraffic([cache]) as traffic:
                touch()
            assert name in traffic.other

    def test_memory_beside_the_cache_does_not_depend_on_its_capacity(self):
        peaks = []
        for capacity in (512, 4096):
            engine = engine_of(capacity=capacity)
            with LiveMemory() as memory:
                engine.ask(IMAGE, QUESTION, looks=[REGION], max_new_tokens=5)
            peaks.append(memory.peak)
        assert peaks[0] == peaks[1]


class Work(TorchDispatchMode):
    """Elements that each operation returned; attention and its mask, which grow with what came before, only called."""

    def __init__(self) -> None:
        super().__init__()
        self.done: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        size = 0 if name in ("full", "triu_") else sum(x.numel() for x in tensors(result))
        if name not in ("slice", "select", "transpose", "unsqueeze", "detach"):
            self.done[name, size] += 1
        return result


@pytest.mark.parametrize("look", [REGION, "clip"])
def test_forty_looks_in_one_conversation_cost_the_same_each(look):
    looks, options = 40, {"max_new_tokens": 4, "looks": [look] * 40}
    engine, costs, lengths = engine_of(max_looks=looks, capacity=4096), [], []
    (cache,) = engine.pool.idle
    with Work() as work:
        for event in engine.stream(IMAGE, QUESTION, **options):
            if isinstance(event, Look):
                costs.append(work.done)
                lengths.append(cache.length)
                work.done = Counter()
            elif isinstance(event, Done):
                answer = event.answer
    # The token behind the last look is not forced: choosing it is the only work that the others lack.
    assert len(answer.looks) == looks and len({tuple(sorted(cost.items())) for cost in costs[1:-1]}) == 1
    assert len({after - before for before, after in zip(lengths, lengths[1:])}) == 1
    assert fed(answer) == lengths[-1] + len(answer.ids) - 1, "no token was fed twice"
    assert answer.ids == engine_of(max_looks=looks, capacity=4096).ask(IMAGE, QUESTION, **options).ids


def on_a_fork(engine: Engine, conversation: Conversation, prompted: Question, output: Output, look: str) -> Answer:
    """The answer of a second conversation that begins behind the first look and is forgotten."""
    question = replace(prompted, forced=deque([parse_look(look, engine.ids)]), turns=[], looks=[], notices=[])

    def row() -> Row:
        with closing(conversation.fork()) as fork:
            turn = yield from engine.loop.decode(fork, question, output)
            while (behind := (yield from engine.loop.look_again(fork, question, turn))) is not None:
                turn = yield from engine.loop.decode(fork, question, behind)
            yield Done(question.summary(engine.tokenizer.decode, fork.clock.stages, False))

    *_, (_, done) = Scheduler(engine.executor, [row()]).events()
    return done.answer


def prefilled(engine: Engine, conversation: Conversation, question: Question) -> Output:
    outputs = []

    def row() -> Row:
        outputs.append((yield from engine.loop.prefill(conversation, question)))

    assert list(Scheduler(engine.executor, [row()]).events()) == []
    return outputs[0]


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("looks", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_looks_over_forks_of_one_conversation_leave_nothing_behind(looks):
    engine = engine_of()
    specs = [REGION, "clip", "region:x0,y0,x7,y7"]
    fresh = {spec: engine_of().ask(IMAGE, QUESTION, looks=[spec], max_new_tokens=3).ids for spec in specs}
    memory, alive, objects = LiveMemory(), [], []
    with closing(engine.pool.conversation(Clock(engine.model.device))) as conversation:
        question = engine.question(IMAGE, QUESTION, max_new_tokens=3)
        output = prefilled(engine, conversation, question)
        length = conversation.length
        with memory:
            for number in range(looks):
                spec = specs[number % len(specs)]
                assert on_a_fork(engine, conversation, question, output, spec).ids == fresh[spec]
                assert conversation.length == length
                if number % (2 * len(specs)) == 0:
                    gc.collect()
                    alive.append(memory.now)
                    objects.append(len(gc.get_objects()))
                if number == looks // 4:
                    quarter = resident()
    assert set(alive) == {alive[0]}, "bytes of tensors"
    assert objects[-1] - objects[1] <= 2, "Python objects (the two that this test keeps)"
    assert resident() - quarter < 4 << 20, "pages of the process"
    assert len(engine.pool.idle) == 1


@pytest.mark.slow
def test_peak_memory_is_weights_cache_and_the_largest_activation():
    config = replace(PRESETS["2b-slice"], kind="clip")
    state = random_state(config)
    engine = Engine(Model.from_state(config, state), Tokenizer.byte_level(config.vocab_size, "clip"))
    weights = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.values()}.values())
    with LiveMemory() as memory:
        answer = engine.ask(random_image(384, 512), QUESTION, looks=["clip"], max_new_tokens=3)
    prefill = next(stage.work["tokens"] for stage in answer.timings if stage.name == "prefill")
    largest = prefill * 2 * config.intermediate_size * 4
    necessary = weights + engine.pool.idle[0].nbytes + largest
    assert weights + engine.pool.idle[0].nbytes + memory.peak <= 1.05 * necessary
    assert memory.peak <= 3 * largest, "gate and up, their product, and what is small beside them"
