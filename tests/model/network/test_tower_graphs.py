"""The towers in buckets of patches, and re-encoding ahead of its time, as far as a CPU shows them."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from tests.model.inputs import random_image, tiny_model
from tests.model.watch import Reads
from vpt_model.config import ENCODERS
from vpt_model.engine import Engine, perception
from vpt_model.engine.events import Clock
from vpt_model.network.tower_graphs import PATCHES, CapturedEncoder, CapturedTower, PatchStep
from vpt_model.text.tokens import Tokenizer

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
THREE = "region:x2,y1,x5,y4+x0,y0,x0,y0+x7,y6,x6,y7"
NAN = float("nan")


def embeds(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_every_image_in_a_bucket_equals_the_unpadded_one():
    """What an earlier, larger image left behind, even NaN, does not reach a later one."""
    tower = tiny_model().vision
    step = PatchStep(tower, 64)
    for height in range(2, 9, 2):
        for width in range(2, 64 // height + 1, 2):
            step.x.fill_(NAN)
            given = embeds(height * width, height)
            found = step(given, [(height, width)])
            torch.testing.assert_close(found, tower.forward(given, [(height, width)]), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_images_that_share_a_replay_do_not_see_each_other():
    tower, given = tiny_model().vision, torch.zeros(40, tiny_model().config.hidden_size)
    step = PatchStep(tower, 128, given)
    step.x.fill_(NAN)
    for grids in ([(4, 4), (2, 6), (8, 8)], [(2, 2)], [(2, 2)] * 8, [(8, 16)]):
        count = sum(height * width for height, width in grids)
        patches = embeds(count, len(grids))
        expected = tower.forward(patches, grids)
        torch.testing.assert_close(step(patches, grids), expected, rtol=1e-5, atol=1e-5)
        given.fill_(NAN)
        rows = torch.randperm(39)[: count // 4] + 1
        step.upload(patches, grids, rows.to(torch.int32))
        features = step.replay()[: count // 4]
        assert torch.equal(given[rows], features) and int((~given[1:].isnan()).any(1).sum()) == count // 4


@torch.inference_mode()
def test_nothing_in_a_step_waits_for_the_device():
    with Reads() as reads:
        PatchStep(tiny_model().vision, 64).run()
    assert reads.names == []


@torch.inference_mode()
def test_images_take_their_buckets_and_large_ones_none():
    tower, used = CapturedTower(tiny_model().vision, [16, 64]), []
    for patches, step in tower.steps.items():
        step.run = lambda patches=patches, run=step.run: used.append(patches) or run()
    grids = [(4, 4), (2, 10), (8, 8)]
    given = embeds(sum(height * width for height, width in grids))
    expected = tiny_model().vision.forward(given, grids)
    torch.testing.assert_close(tower.forward(given, grids), expected, rtol=1e-5, atol=1e-5)
    assert used == [16, 64, 64]
    grids = [(4, 4), (6, 12)]
    given = embeds(88)
    assert torch.equal(tower.forward(given, grids), tiny_model().vision.forward(given, grids)) and len(used) == 3
    with pytest.raises(ValueError, match="88 patch embeddings"):
        tower.forward(given, [(4, 4)])


def test_the_largest_image_of_the_engine_has_a_bucket():
    assert max(PATCHES) == (512 // 28 * 2) ** 2 and all(patches % 4 == 0 for patches in PATCHES)


def towers_of(encoder: str) -> Engine:
    """An engine whose towers run in steps, which are eager here."""
    engine = engine_of(encoder)
    model = engine.model
    again = model.encoder and CapturedEncoder(model.encoder)
    engine.executor.model = replace(model, vision=CapturedTower(model.vision), encoder=again)
    return engine


def engine_of(encoder: str) -> Engine:
    kind = ENCODERS[encoder]
    return Engine(tiny_model(kind), Tokenizer.byte_level(320, kind))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("look", [THREE, "re-encode"])
def test_the_engine_chooses_the_same_tokens(encoder, look):
    options = {"looks": [encoder if look == "re-encode" else look], "max_new_tokens": 6, "keep_logits": True}
    expected = engine_of(encoder).ask(IMAGE, QUESTION, **options)
    engine = towers_of(encoder)
    for _ in range(2):
        answer = engine.ask(IMAGE, QUESTION, **options)
        assert answer.ids == expected.ids and (answer.logits - expected.logits).abs().max() <= 1e-4
        assert answer.looks == expected.looks


def test_a_re_encoder_takes_one_image_and_leaves_several_to_itself():
    encoder = tiny_model("detection").encoder
    captured = CapturedEncoder(encoder)
    with torch.inference_mode():
        two = encoder.embed_regions([IMAGE, IMAGE.flip(0)], [(0, 0, 0, 230, 150), (1, 0, 0, 230, 150)])
        assert torch.equal(captured(two), encoder(two))
        assert torch.equal(captured(two[: len(two) // 2]), encoder(two[: len(two) // 2]))


class Streams:
    """Stands for torch.cuda's streams: the order of what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.names = ["main"]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream(self.names[-1]))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: self.calls.append(f"{x.dtype} used by {s}"))

    def stream(self, name: str) -> Stream:
        return Stream(name, self.calls)

    @contextlib.contextmanager
    def on(self, stream):
        self.names.append(stream.name)
        yield
        self.names.pop()


class Stream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: Stream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def __str__(self) -> str:
        return self.name


class TestAhead:
    @pytest.mark.parametrize("encoder", ["dino", "sam"])
    @pytest.mark.parametrize("look", [None, "re-encode", THREE])
    def test_same_tokens_whether_it_is_asked_for_or_dropped(self, monkeypatch, encoder, look):
        looks = look and [encoder if look == "re-encode" else look]
        options = {"looks": looks, "max_new_tokens": 6}
        expected = engine_of(encoder).ask(IMAGE, QUESTION, **options)
        streams, engine = Streams(monkeypatch), engine_of(encoder)
        engine.executor.speculate = True
        answer = engine.ask(IMAGE, QUESTION, **options)
        assert answer.ids == expected.ids
        begun = ["side waits for main", "torch.uint8 used by side"]
        taken = ["main waits for side", "torch.float32 used by main"]
        assert streams.calls == begun + (taken if look == "re-encode" else [])

    def test_a_dropped_one_keeps_no_memory(self, monkeypatch):
        Streams(monkeypatch)
        model = tiny_model("detection")
        with torch.inference_mode():
            ahead = perception.Ahead(model, IMAGE)
            taken = perception.reencode(model, IMAGE, IMAGE, Clock(torch.device("cpu")), ahead)
            assert torch.equal(taken, perception.reencode(model, IMAGE, IMAGE, Clock(torch.device("cpu"))))
        gone = weakref.ref(ahead.features)
        del ahead, taken
        gc.collect()
        assert gone() is None

    def test_an_abandoned_stream_drops_it(self, monkeypatch):
        streams, engine = Streams(monkeypatch), engine_of("dino")
        engine.executor.speculate = True
        stream = engine.stream(IMAGE, QUESTION, looks=["dino"])
        next(stream)
        stream.close()
        assert streams.calls == ["side waits for main", "torch.uint8 used by side"]
        assert [cache.length for cache in engine.pool.idle] == [0]

    def test_a_cpu_declines(self):
        kind = ENCODERS["dino"]
        assert not Engine(tiny_model(kind), Tokenizer.byte_level(320, kind), speculate=True).executor.speculate
