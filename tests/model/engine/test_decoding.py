"""Decoding a step ahead, graphs emulated on the CPU: the same ids, at most one step too many, which nobody sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bench.launches.pretended import Pretended
from tests.model.engine.emulated import Watched
from tests.model.engine.recorded import CASES, VARIANTS, RecordedEngine, image, matches, recorded
from tests.model.engine.scripts import Wrapped, answers_of
from tests.model.inputs import (
    golden,
    golden_state,
    golden_token_ids,
    random_image,
    tiny_config,
    tiny_model,
    tiny_state,
)
from vpt_model.config import ENCODERS
from vpt_model.engine import Done, Engine, Sampling, Token
from vpt_model.engine.graphs import Bucket, StepMetadata
from vpt_model.engine.requests import Decode, Output
from vpt_model.engine.sampling import DRAWS, Sampler
from vpt_model.network.model import Model
from vpt_model.text.tokens import Tokenizer

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
REGION = "region:x2,y1,x5,y4"
NAN = float("nan")
SAMPLINGS = {
    "greedy": None,
    "sampled": Sampling(1.5, seed=5),
    "top-k": Sampling(2.0, top_k=20, seed=6),
    "top-p": Sampling(1.2, top_p=0.9, seed=7),
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


class Decodes(Wrapped):
    """Counts the tokens that are fed one by one, and what is there after each run.

    unseen: how often a token might have followed one, and something else did: there a step was too many.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.executor)
        engine.executor, self.count, self.held = self, 0, []
        self._open, self._ended = {}, 0

    @property
    def unseen(self) -> int:
        return self._ended + len(self._open)

    def run(self, requests):
        for request in requests:
            chosen = self._open.pop(request.conversation, None)
            follows = isinstance(request, Decode) and list(request.tokens) == [chosen] and request.embeds is None
            self._ended += chosen is not None and not follows
        results = super().run(requests)
        decodes = [(r, out) for r, out in zip(requests, results) if isinstance(r, Decode)]
        self.count += len(decodes)
        self._open |= {r.conversation: -1 if out.token is None else out.token for r, out in decodes if r.ahead}
        # A look by re-encoding is two runs without graphs, and only the second one has an output.
        done = [r.conversation for r, out in zip(requests, results) if isinstance(out, Output)]
        self.held += [[(one.length, list(one.tokens)) for one in done]] if done else []
        return results


def engine_of(encoder: str = "clip", **options) -> Engine:
    kind = ENCODERS[encoder]
    return Engine(tiny_model(kind), Tokenizer.byte_level(320, kind), **({"capacity": 512} | options))


def stopping(engine: Engine, *tokens: int) -> Engine:
    """The engine, whose answers also end with these tokens."""
    engine.loop.ids = replace(engine.loop.ids, stop=engine.loop.ids.stop | set(tokens))
    return engine


@each_sampling
@pytest.mark.parametrize("look", [REGION, "re-encode", None])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_same_tokens(encoder, look, sampling, monkeypatch):
    """As without graphs; every conversation holds what it holds there. One step too many where a round ends unseen."""
    options = {"looks": look and [encoder if look == "re-encode" else look], "max_new_tokens": 9}
    options |= {"keep_logits": True, "sampling": sampling}
    eager = engine_of(encoder)
    plain = Decodes(eager)
    expected = eager.ask(IMAGE, QUESTION, **options)
    engine = engine_of(encoder)
    watched, mine = Watched(engine, monkeypatch), Decodes(engine)
    for _ in range(2):
        answer = engine.ask(IMAGE, QUESTION, **options)
        assert answer.ids == expected.ids and (answer.logits - expected.logits).abs().max() <= 1e-4
    assert mine.held == 2 * plain.held
    assert watched.replays == mine.count + mine.unseen and mine.unseen <= 2 * (1 + len(expected.looks))


def test_the_host_is_one_step_behind(monkeypatch):
    """Of the first token of a round the integers are uploaded; from then on a replay goes before every read."""
    engine = engine_of()
    watched = Watched(engine, monkeypatch)
    assert engine.ask(IMAGE, QUESTION, max_new_tokens=6, sampling=SAMPLINGS["top-k"]).finish_reason == "length"
    first = ["upload 1", "replay 1", "replay 1", "read"]
    assert watched.log == [*first, *(3 * ["replay 1", "read"]), "read"]


@each_sampling
def test_what_a_token_waits_for(sampling):
    """On a pretended GPU: one event, the next step being on its way; nothing else is waited for or brought there.

    Of the device it asks a replay, which also draws, and copies of what comes out of it.
    """
    shapes = {name: x.shape for name, x in tiny_state().items()}
    with Pretended() as gpu:
        state = {name: gpu.empty(shape, torch.bfloat16) for name, shape in shapes.items()}
        engine = Engine(Model.from_state(tiny_config(), state), Tokenizer.byte_level(320, "clip"), capacity=512)
        engine.warm_up()
        marks = []
        for event in engine.stream(None, QUESTION, max_new_tokens=7, sampling=sampling):
            marks += [gpu.tally.copy()] if isinstance(event, Token) else []
    first, *steady, last = (after - before for before, after in zip(marks[1:], marks[2:]))
    assert (first.replays, last.replays) == (1, 0), "the last one was launched before"
    for token in steady:
        assert (token.replays, token.waits.total(), token.waits["event.synchronize"]) == (1, 1, 1)
        assert (token.uploads, token.downloads) == (0, 1)
        assert token.order == ["replay", "clone", "clone", "clone", "copy"]


@each_sampling
@pytest.mark.parametrize("place", range(1, 6))
def test_an_end_that_nobody_saw_coming(place, sampling, monkeypatch):
    """A token that ends the answer: one replay was too many, and no part of it is there for what comes next."""
    options = {"max_new_tokens": 8, "sampling": sampling}
    ids = engine_of().ask(IMAGE, "~", **options).ids
    end = ids[min(place, len(ids) - 1)]
    place = ids.index(end)
    plain, engine = (stopping(engine_of(), end) for _ in range(2))
    watched = Watched(engine, monkeypatch)
    found = []
    for one in (plain, engine):
        answers = [one.ask(IMAGE, question, **options) for question in ("~", "~~", "~")]
        found.append([[answer.ids, answer.finish_reason] for answer in answers])
    assert found[0] == found[1] and watched.log
    watched.log.clear()
    answer = engine.ask(IMAGE, "~", **options)
    assert answer.ids == ids[: place + 1] and answer.finish_reason == "stop"
    assert watched.replays == (place + 1 if place else 0)


@pytest.mark.parametrize("name", CASES)
def test_recorded_second_rounds(name, monkeypatch):
    """The authors' ids and logits."""
    engine = RecordedEngine(name, "fwd")
    steps = recorded(name, "gen")[0].shape[1]
    watched = on_recorded(engine, monkeypatch)
    options = {"looks": [engine.recorded_look()], "max_new_tokens": steps, "keep_logits": True}
    matches([engine.ask(image(0), "0", **options)], name, "gen")
    assert steps < 3 or watched.log[-3:] == ["replay 1", "read", "read"]


@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_batches(name, monkeypatch):
    engine = RecordedEngine(name, "gen_b2")
    watched = on_recorded(engine, monkeypatch)
    steps, looks = recorded(name, "gen_b2")[0].shape[1], [[name]] * len(engine.rows)
    options = {"looks": looks, "max_new_tokens": steps, "keep_logits": True}
    answers = engine.ask_batch([image(row) for row in engine.rows], [str(row) for row in engine.rows], **options)
    matches(answers, name, "gen_b2")
    assert "replay 2" in watched.log


@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_actions_that_start_in_a_step_ahead(name, monkeypatch):
    """The model says the action start by itself: it was fed ahead, as an ordinary token, and is fed again as a look."""
    state = dict(golden_state(name))
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    row = golden(name)[0]["r1_free.lm_head_row_action_start"]
    state["lm_head.weight"][golden_token_ids(name).action_start] = row
    engine = RecordedEngine(name, "r1_free", state, max_looks=0)
    watched = on_recorded(engine, monkeypatch)
    matches(engine.follow([[]], recorded(name, "r1_free")[0].shape[1]), name, "r1_free")
    assert watched.replays
    plain, engine = (RecordedEngine(name, "r1_free", state) for _ in range(2))
    watched = on_recorded(engine, monkeypatch)
    expected, found = (one.ask(image(0), "0", max_new_tokens=6) for one in (plain, engine))
    assert found.ids == expected.ids and [look.kind for look in found.looks] == [name] and watched.replays


def on_recorded(engine: RecordedEngine, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(engine, monkeypatch)
    engine.recorded.executor, engine.executor = engine.executor, engine.recorded
    return watched


@each_sampling
def test_rows_that_end_at_different_steps(sampling, monkeypatch):
    """Each row's tokens are those of its single run; the rows that stay go on ahead."""
    questions, looks = ["~", "~~", "~", "~~~"], [[REGION], None, None, ["clip"]]
    images = [IMAGE, None, IMAGE, IMAGE]
    options = {"max_new_tokens": 9, "sampling": sampling}
    single = [engine_of().ask(i, q, looks=k, **options).ids for i, q, k in zip(images, questions, looks)]
    plain, engine = (stopping(engine_of(), single[1][1], single[2][3]) for _ in range(2))
    expected = plain.ask_batch(images, questions, looks=looks, **options)
    watched = Watched(engine, monkeypatch)
    found = engine.ask_batch(images, questions, looks=looks, **options)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    assert len({len(answer.ids) for answer in found}) > 1
    assert any(a.startswith("replay") and b == a for a, b in zip(watched.log, watched.log[1:])), "nothing ran ahead"


@each_sampling
def test_streams_that_take_turns(sampling, monkeypatch):
    """On one engine, event by event; what was launched for one is there when it is asked again."""
    options = {"max_new_tokens": 9, "sampling": sampling}
    asked = [("Why?", None), (QUESTION, IMAGE), ("Who?", IMAGE)]
    expected = [engine_of().ask(image, question, **options).ids for question, image in asked]
    engine = engine_of()
    watched, counted = Watched(engine, monkeypatch), Decodes(engine)
    streams: dict[int, Iterator] = {n: engine.stream(i, q, **options) for n, (q, i) in enumerate(asked)}
    found: dict[int, list[int]] = {}
    while len(found) < len(asked):
        for number, stream in streams.items():
            if isinstance(event := next(stream, None), Done):
                found[number] = event.answer.ids
    assert [found[number] for number in range(len(asked))] == expected
    assert watched.replays == counted.count + counted.unseen <= counted.count + len(asked)


def test_a_full_cache_ends_where_its_rows_end(monkeypatch):
    """The last token that fits is the last one that is fed: behind it begins another conversation's row."""
    length = prompt_length()
    for room in range(1, 6):
        capacity = length + room
        expected = engine_of(capacity=capacity).ask(None, QUESTION, max_new_tokens=20)
        engine = engine_of(capacity=capacity)
        watched = Watched(engine, monkeypatch, rows=2)
        leased = engine.pool.idle[-1]
        others = torch.ones(2 * capacity, dtype=torch.bool)
        others[leased.first : leased.first + capacity] = False
        before = [buffer[:, others].clone() for buffer in watched.graphs.slab]
        found = engine.ask(None, QUESTION, max_new_tokens=20)
        assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason) and len(found.ids) == room + 1
        for buffer, old in zip(watched.graphs.slab, before):
            assert torch.equal(buffer[:, others].view(torch.int32), old.view(torch.int32))


def prompt_length() -> int:
    engine = engine_of()
    counted = Decodes(engine)
    engine.ask(None, QUESTION, max_new_tokens=1)
    return counted.held[-1][0][0]


@pytest.mark.parametrize("place", range(4))
def test_logits_that_are_nan(place, monkeypatch):
    """The step that was launched behind them has no token to feed: the answer ends as without graphs."""
    engine = engine_of()
    Watched(engine, monkeypatch)
    language, calls = engine.model.language, []
    own = type(language).choose

    def choose(model, hidden, tickets):
        logits, chosen = own(model, hidden, tickets)
        calls.append(1)
        if len(calls) > place:
            logits, chosen = torch.full_like(logits, NAN), torch.full_like(chosen, -1)
        return logits, chosen

    monkeypatch.setattr(type(language), "choose", choose)
    for sampling in SAMPLINGS.values():
        calls.clear()
        answer = engine.ask(IMAGE, QUESTION, max_new_tokens=8, sampling=sampling)
        assert answer.finish_reason == "nan" and len(answer.ids) == place
        assert "are NaN" in answer.notices[-1]
    monkeypatch.undo()
    assert engine.ask(IMAGE, QUESTION, max_new_tokens=8).ids == engine_of().ask(IMAGE, QUESTION, max_new_tokens=8).ids


def test_abandoned_streams_leave_nothing(monkeypatch):
    """A step that was launched for a stream that is closed writes to a cache that others lease next."""
    options = {"max_new_tokens": 7, "sampling": SAMPLINGS["top-k"]}
    expected = engine_of().ask(IMAGE, QUESTION, **options).ids
    engine = engine_of()
    Watched(engine, monkeypatch, rows=1)
    for taken in range(1, 7):
        stream = engine.stream(IMAGE, QUESTION, **options)
        for _ in range(taken):
            next(stream)
        stream.close()
        assert engine.ask(IMAGE, QUESTION, **options).ids == expected


def test_integers_of_the_step_behind():
    metadata = StepMetadata(Bucket(3, 1, True), "cpu")
    metadata.fill(())
    metadata.tokens[0], metadata.slots[0], metadata.starts[0], metadata.past[0], metadata.counts[0] = 5, 47, 40, 7, 1
    metadata.positions[:, 0] = torch.tensor([3, 4, 5])
    metadata.follow(torch.tensor([9, 8, -1]))
    assert metadata.tokens.tolist() == [9, 8, -1] and metadata.slots.tolist() == [48, -1, -1]
    assert metadata.positions.tolist() == [[4, 0, 0], [5, 0, 0], [6, 0, 0]]
    assert [x.tolist() for x in (metadata.starts, metadata.past, metadata.counts)] == [[40, 0, 0], [8, 0, 0], [1, 0, 0]]


def test_draws_of_the_step_behind():
    """The next one of each row that goes on; those of padding are nobody's."""
    metadata = StepMetadata(Bucket(2, 1, True, True), "cpu")
    metadata.fill(())
    metadata.counts[0] = 1
    metadata.draws.copy_(torch.arange(2 * DRAWS, dtype=torch.float64).view(2, -1))
    for number in range(3):
        assert metadata.spent.tolist() == [number, 0]
        metadata.follow(torch.tensor([9, 8]))
    assert metadata.draws[0, 2] == 2 and metadata.limits.tolist() == 3 * [[0, 0]], "they lie apart"


def test_draws_that_nobody_spent_are_there_again(monkeypatch):
    """However many are made at a time."""
    expected = Sampler(Sampling(1.0, seed=3)).draws(3 * DRAWS).tolist()
    for together in (1, 7, DRAWS):
        monkeypatch.setattr("vpt_model.engine.sampling.DRAWS", together)
        sampler, found = Sampler(Sampling(1.0, seed=3)), []
        for number in range(2 * DRAWS):
            first, *_ = sampler.draws(1 + number % (DRAWS // 2)).tolist()
            found += [first] if number % 3 else []
            if number % 3:
                sampler.spend()
        assert found == expected[: len(found)] and len(set(found)) == len(found)


GRID = [Sampling(t, k, p) for t in (0.3, 1.0, 2.5) for k, p in ((0, 1.0), (0, 0.7), (12, 1.0), (40, 0.95), (3, 0.4))]


@pytest.mark.parametrize("sampling", GRID, ids=lambda one: f"{one.temperature}, {one.top_k}, {one.top_p}")
def test_a_seed_means_the_same_in_a_graph(sampling, monkeypatch):
    """Sixteen seeds: the tokens of the engine without graphs, and no row of a batch disturbs another's draws."""
    eager, engine = engine_of(), engine_of()
    Watched(engine, monkeypatch)
    answers = set()
    for seed in range(0, 16, 4):
        samplings = [replace(sampling, seed=seed + number) for number in range(3)] + [None]
        options = [{"max_new_tokens": 5, "sampling": one} for one in samplings]
        expected = [eager.ask(None, "~", **one).ids for one in options]
        asked = [engine.question(None, "~", **one) for one in options]
        assert [answer.ids for answer in answers_of(engine, asked)] == expected
        assert [engine.ask(None, "~", **one).ids for one in options[:2]] == expected[:2]
        answers |= {tuple(ids) for ids in expected[:3]}
    assert len(answers) > 5 or sampling.top_p < 0.5


@pytest.mark.parametrize("together", [1, 2, 3])
def test_draws_that_run_out(together, monkeypatch):
    """The host gives the device further ones, behind a token that it has read; the tokens stay."""
    sampling = Sampling(1.5, top_p=0.95, seed=11)
    expected = engine_of().ask(IMAGE, QUESTION, max_new_tokens=9, sampling=sampling).ids
    for module in ("sampling", "graphs", "decoding"):
        monkeypatch.setattr(f"vpt_model.engine.{module}.DRAWS", together)
    engine = engine_of()
    watched = Watched(engine, monkeypatch)
    assert engine.ask(IMAGE, QUESTION, max_new_tokens=9, sampling=sampling).ids == expected and len(expected) == 9
    uploads = [number for number, entry in enumerate(watched.log) if entry == "upload 1"]
    assert len(uploads) == -(-8 // together) and watched.replays == 8
    assert all(watched.log[number - 1] == "read" for number in uploads[1:])
