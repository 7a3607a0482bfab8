"""What each part of the engine owns: caches, positions, limits, and who may change them."""

from __future__ import annotations

import gc
import logging
import sys
from contextlib import closing

import pytest

from tests.model.engine.scripts import Steps, Wrapped, question_of
from tests.model.inputs import random_image, tiny_model
from vpt_model.engine import Engine
from vpt_model.engine import loop as loop_module
from vpt_model.engine.conversation import Conversation
from vpt_model.engine.events import Clock, Done
from vpt_model.engine.graphs import TRIGGER, Bucket, Graphs
from vpt_model.engine.requests import Append, CropAndAppend, Decode, ReencodeAndAppend
from vpt_model.engine.scheduler import Scheduler
from vpt_model.network.cache import KVCache
from vpt_model.text.tokens import Tokenizer

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
REGION = "region:x2,y1,x5,y4"
BUCKETS = (Bucket(1, 1, False), *(Bucket(rows, 1, True) for rows in (1, 2, 4)), Bucket(1, 320, True))


def engine_of(**options) -> Engine:
    return Engine(tiny_model(), Tokenizer.byte_level(320, "clip"), **{"capacity": 512} | options)


def prefilled(engine: Engine) -> Conversation:
    """A conversation whose prompt has been fed, by a generator that has ended."""
    conversation, question = engine.pool.conversation(Clock(engine.model.device)), engine.question(IMAGE, QUESTION)

    def row():
        yield from engine.loop.prefill(conversation, question)

    assert list(Scheduler(engine.executor, [row()]).events()) == []
    return conversation


class TestLease:
    def test_a_conversation_outlives_the_generator_that_fed_it(self):
        engine = engine_of()
        conversation = prefilled(engine)
        assert conversation.length > 40 and engine.pool.idle == [] and not conversation.closed
        cache = conversation.cache
        conversation.close()
        conversation.close()
        assert conversation.closed and engine.pool.idle == [cache] and cache.length == 0

    def test_a_forgotten_conversation_gives_its_cache_back(self):
        engine = engine_of()
        conversation = prefilled(engine)
        cache = conversation.cache
        del conversation
        gc.collect()
        assert engine.pool.idle == [cache] and cache.length == 0

    def test_done_comes_when_the_cache_is_free_again(self):
        engine = engine_of()
        for event in engine.stream(IMAGE, QUESTION, looks=["clip"], max_new_tokens=2):
            assert len(engine.pool.idle) == isinstance(event, Done)


def test_looks_are_limited_by_the_question_not_by_the_conversation():
    """Two questions in one conversation, each of which may look once."""
    engine, looks = engine_of(capacity=1024), []
    with closing(engine.pool.conversation(Clock(engine.model.device))) as conversation:
        for _ in range(2):
            question = question_of(engine, QUESTION, IMAGE, [[engine.ids.action_start]], max_new_tokens=2)

            def row(question=question):
                yield Done((yield from engine.loop.answer(conversation, question)))

            *_, (_, done) = Scheduler(engine.executor, [row()]).events()
            looks.append([look.kind for look in done.answer.looks])
    assert looks == [["clip"], ["clip"]]


@pytest.mark.parametrize("graphs", [False, True])
def test_executors_alone_advance_caches(monkeypatch, graphs):
    engine, callers = engine_of(), set()
    for owner in (KVCache, Conversation):

        def watched(one, *arguments, advance=owner.advance):
            callers.add(sys._getframe(1).f_globals["__name__"])
            advance(one, *arguments)

        monkeypatch.setattr(owner, "advance", watched)
    if graphs:
        engine.use(engine.model, Graphs(engine.model, engine.capacity, 4, BUCKETS))
    engine.ask_batch([IMAGE] * 3, [QUESTION] * 3, looks=[[REGION], ["clip"], None], max_new_tokens=3)
    assert callers == {"vpt_model.engine.executor", "vpt_model.engine.conversation"}


def test_a_restored_conversation_is_not_advanced(monkeypatch, tmp_path):
    """What lies in its cache was not fed."""
    engine, advanced = engine_of(), []
    with engine.chat(IMAGE) as chat:
        chat.ask(QUESTION, max_new_tokens=2)
        chat.save(tmp_path / "chat")
    for owner in (KVCache, Conversation):
        monkeypatch.setattr(owner, "advance", lambda *arguments: advanced.append(arguments))
    with engine.load_chat(tmp_path / "chat") as restored:
        assert advanced == [] and restored.length > 40


def test_positions_are_computed_once_and_used_as_they_are(monkeypatch):
    """One computation for every chunk that is no single decoded token; what it says comes next is what comes next."""
    engine, computed, seen, compute = engine_of(), [], [], loop_module.mrope_positions

    def positions(*arguments):
        computed.append(compute(*arguments))
        return computed[-1]

    class Seen(Wrapped):
        def run(self, requests):
            results = super().run(requests)
            for request, result in zip(requests, results, strict=True):
                if not isinstance(request, Decode) and not isinstance(result, ReencodeAndAppend):
                    seen.append(request)
                    assert request.conversation.next_position == request.next_position
            return results

    monkeypatch.setattr(loop_module, "mrope_positions", positions)
    engine.executor = Seen(engine.executor)
    engine.ask(IMAGE, QUESTION, looks=[REGION], max_new_tokens=3)
    engine.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=3)
    engine.ask(None, QUESTION, max_new_tokens=3)
    kinds = [CropAndAppend, CropAndAppend, CropAndAppend, ReencodeAndAppend, Append]
    assert [type(request) for request in seen] == kinds
    assert all(request.positions is mine for request, (mine, _) in zip(seen, computed, strict=True))


class TestGraphs:
    def engine(self, rows: int = 4) -> Engine:
        engine = engine_of()
        engine.use(engine.model, Graphs(engine.model, engine.capacity, rows, BUCKETS))
        return engine

    def test_decoding_rows_replay_while_another_appends(self):
        """One row is in its look while three decode: they keep their bucket, it takes its own, nothing runs eagerly."""
        requests = [IMAGE] * 4, [QUESTION] * 4
        options = {"looks": [None, ["clip"], None, None], "max_new_tokens": 6}
        expected = [answer.ids for answer in engine_of().ask_batch(*requests, **options)]
        engine = self.engine()
        with Steps(engine) as steps:
            assert [answer.ids for answer in engine.ask_batch(*requests, **options)] == expected
        assert steps.eager == [] and steps.buckets.count(Bucket(1, 320, True)) == 5
        look = max(i for i, bucket in enumerate(steps.buckets) if bucket == Bucket(1, 320, True))
        assert steps.buckets[look - 2 : look] == [Bucket(4, 1, True), TRIGGER], "the other rows decode first"

    def test_a_cache_outside_keeps_the_others_inside_and_is_told(self, caplog):
        engine = self.engine(rows=2)
        requests = [None] * 3, [QUESTION, "Why?", "How?"]
        expected = [answer.ids for answer in engine_of().ask_batch(*requests, max_new_tokens=4)]
        with Steps(engine) as steps, caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert [answer.ids for answer in engine.ask_batch(*requests, max_new_tokens=4)] == expected
        assert Bucket(2, 1, True) in steps.buckets and all(len(lengths) == 1 for lengths in steps.eager)
        (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("vpt_model.engine")]
        assert told.startswith("1 of 3 conversations run without CUDA graphs")
        assert all(cache.slab is engine.executor.graphs.slab for cache in engine.pool.idle)

    def test_an_open_stream_goes_on_when_graphs_come(self):
        """As `warm_up` makes them, in the middle of an answer."""
        options = {"looks": [REGION], "max_new_tokens": 4}
        expected = engine_of().ask(IMAGE, QUESTION, **options).ids
        engine = engine_of()
        stream = engine.stream(IMAGE, QUESTION, **options)
        next(stream)
        engine.use(engine.model, Graphs(engine.model, engine.capacity, 2, BUCKETS))
        with Steps(engine) as steps:
            assert engine.ask(IMAGE, QUESTION, **options).ids == expected and steps.eager == []
        *_, done = stream
        assert done.answer.ids == expected
        assert len(engine.pool.idle) == 2 and {cache.length for cache in engine.pool.idle} == {0}


def test_no_hooks_are_left_to_override():
    assert not {"positions", "control_state", "new_cache", "_feed", "_idle"} & set(dir(engine_of()))
