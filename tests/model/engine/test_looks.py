"""Second looks in two replays, graphs emulated on the CPU: nothing between them, and the same answers."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_same_bits
from tests.model.engine.emulated import Watched
from tests.model.engine.recorded import CASES, RecordedEngine, image, matches, recorded
from tests.model.inputs import random_image, tiny_model
from vpt_model.config import ENCODERS
from vpt_model.engine import Engine, Look, Sampling
from vpt_model.engine.graphs import TRIGGER, Bucket
from vpt_model.text.tokens import Tokenizer

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
REGION, THREE = "region:x2,y1,x5,y4", "region:x2,y1,x5,y4+x0,y0,x0,y0+x7,y6,x6,y7"
NINE = "region:" + "+".join(f"x{n},y{n},x{n},y{n}" for n in range(8)) + "+x0,y1,x0,y1"


def engine_of(encoder: str = "clip", **options) -> Engine:
    kind = ENCODERS[encoder]
    return Engine(tiny_model(kind), Tokenizer.byte_level(320, kind), **({"capacity": 512} | options))


def of_the_look(watched: Watched, engine: Engine, **options) -> list[str]:
    """What is launched between the token that ends the first round and the first answer token."""
    with watched.operators():
        for event in engine.stream(IMAGE, QUESTION, **options):
            if isinstance(event, Look):
                return watched.launches
            watched.launches = []
    raise AssertionError("there was no look")


@pytest.mark.parametrize("encoder, look", [(e, "re-encode") for e in ENCODERS] + [("clip", REGION), ("sam", THREE)])
def test_two_replays_and_nothing_between(encoder, look, monkeypatch):
    engine = engine_of(encoder)
    watched = Watched(engine, monkeypatch)
    looks = [encoder if look == "re-encode" else look]
    launches = of_the_look(watched, engine, looks=looks, max_new_tokens=3, keep_logits=True)
    replays = [name for name in launches if not name.startswith("operator")]
    seeing = str(TRIGGER) if encoder == "clip" else f"{TRIGGER}, re-encoder"
    assert replays[0] == (seeing if look == "re-encode" else "512 patches")
    assert replays[1:] == [str(Bucket(1, 320, True))] or replays[1:] == [str(Bucket(1, 64, True))]
    first = launches.index(replays[0])
    assert launches[first : first + 2] == replays, "something was launched between them"


@pytest.mark.parametrize("sampling", [None, Sampling(1.5, seed=5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("look", ["re-encode", REGION, THREE, NINE])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_same_answers(encoder, look, sampling, monkeypatch):
    """Twice, as what a look leaves in the buffers must not reach the next one; nine regions run without."""
    options = {"looks": [encoder if look == "re-encode" else look], "max_new_tokens": 4}
    options |= {"keep_logits": True, "sampling": sampling}
    expected = engine_of(encoder).ask(IMAGE, QUESTION, **options)
    engine = engine_of(encoder)
    watched = Watched(engine, monkeypatch)
    for _ in range(2):
        answer = engine.ask(IMAGE, QUESTION, **options)
        assert answer.ids == expected.ids and (answer.logits - expected.logits).abs().max() <= 1e-4
        assert answer.looks == expected.looks
        assert [stage.name for stage in answer.timings][-3] == ("perceive" if look == "re-encode" else "ViT")
    assert watched.launches


@pytest.mark.parametrize("name", CASES)
def test_recorded_second_rounds(name, monkeypatch):
    """The authors' ids and logits, and what the first look saw."""
    engine = RecordedEngine(name, "fwd")
    watched = Watched(engine, monkeypatch)
    engine.recorded.executor, engine.executor = engine.executor, engine.recorded
    options = {"looks": [engine.recorded_look()], "max_new_tokens": recorded(name, "gen")[0].shape[1]}
    matches([engine.ask(image(0), "0", keep_logits=True, **options)], name, "gen")
    prefill, look = watched.launches[:2], watched.launches[2:]
    assert "patches" in prefill[0] and len(look) == 2
    assert ("patches" if name == "region" else "no logits") in look[0]


def test_looks_side_by_side(monkeypatch):
    """Of several rows in one turn, through the same buffers; a row beyond the graphs' caches goes without."""
    images = [IMAGE, random_image(90, 120, seed=4), IMAGE, random_image(200, 60, seed=5), IMAGE]
    looks = [["clip"], ["clip"], [REGION], [THREE], None]
    options = {"looks": looks, "max_new_tokens": 5}
    questions = ["~", "~~", "~", "~~", "~"]
    expected = engine_of().ask_batch(images, questions, **options)
    engine = engine_of()
    Watched(engine, monkeypatch)
    found = engine.ask_batch(images, questions, **options)
    assert [(answer.ids, answer.looks) for answer in found] == [(answer.ids, answer.looks) for answer in expected]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_further_looks_have_their_own_state(encoder, monkeypatch):
    """Two looks in one answer: the second one's trigger, not the first one's."""
    options = {"looks": [encoder, REGION, encoder], "max_new_tokens": 4}
    expected = engine_of(encoder, max_looks=3, capacity=1536).ask(IMAGE, QUESTION, **options)
    engine = engine_of(encoder, max_looks=3, capacity=1536)
    watched = Watched(engine, monkeypatch)
    answer = engine.ask(IMAGE, QUESTION, **options)
    assert answer.ids == expected.ids and answer.looks == expected.looks and len(answer.looks) == 3
    assert sum("no logits" in name for name in watched.launches) == 2


@pytest.mark.parametrize("look", ["dino", REGION])
def test_a_look_that_does_not_fit_writes_nothing(look, monkeypatch):
    """The engine says so before; asked by itself, the executor refuses before anything is written."""
    engine = engine_of("dino")
    watched = Watched(engine, monkeypatch)
    run = engine.executor.run
    monkeypatch.setattr("vpt_model.engine.conversation.Question.fits", lambda *given: True)
    room = [0]

    def full(requests):
        for request in requests:
            if len(request.tokens) > 6 and request.conversation.length:
                cache = request.conversation.cache
                room[0], cache.capacity = cache.capacity, cache.length + len(request.tokens) - 1
                watched.launches.clear()
        return run(requests)

    engine.executor.run = full
    with pytest.raises(ValueError, match="its capacity is"):
        engine.ask(IMAGE, QUESTION, looks=[look], max_new_tokens=3)
    assert room[0] and watched.launches == []


@torch.inference_mode()
def test_a_trigger_alone_disturbs_nobody(monkeypatch):
    """As it is fed where its look fits no bucket: of the shared embeddings, the row that nobody reads is written."""
    engine = engine_of("sam")
    watched = Watched(engine, monkeypatch)
    given = watched.graphs.given.copy_(torch.randn_like(watched.graphs.given))
    before = given.clone()
    step = watched.graphs.steps[TRIGGER]
    step.upload(())
    step.replay()
    assert_same_bits(given[1:], before[1:])
