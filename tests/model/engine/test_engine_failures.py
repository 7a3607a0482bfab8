"""What the engine shares (nothing), how it ends, and that it can be used after whatever went wrong."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable

import pytest
import torch

import vpt_model.network.attention
from tests.model.engine import scripts
from tests.model.inputs import random_image, tiny_config, tiny_model, tiny_state
from vpt_model.engine import Engine, perception
from vpt_model.engine.events import Answer, Done
from vpt_model.network.model import Model
from vpt_model.text.tokens import Tokenizer

TOKENIZER = Tokenizer.byte_level(320, "clip")
IDS = TOKENIZER.ids
IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
REGION = "region:x2,y1,x5,y4"
LOOKS = [[REGION], ["clip"], None]
NAN = float("nan")


def engine_of(model: Model | None = None, **options) -> Engine:
    return Engine(model or tiny_model(), TOKENIZER, **options)


def ids(engine: Engine) -> list[list[int]]:
    return [engine.ask(IMAGE, QUESTION, looks=looks, max_new_tokens=6).ids for looks in LOOKS]


def scripted(engine: Engine, *rounds: list[int], **options) -> Answer:
    return scripts.scripted(engine, QUESTION, IMAGE, rounds, **options)


class TestTwoEngines:
    """One over the same weights, one over others; with streams that take turns, event by event."""

    def engines(self) -> list[Engine]:
        return [engine_of(), engine_of(), engine_of(tiny_model("clip", 1))]

    def test_interleaved_streams_share_nothing(self):
        fresh = [ids(engine) for engine in self.engines()]
        assert fresh[0] == fresh[1] != fresh[2]
        streams = {
            (number, row): engine.stream(IMAGE, QUESTION, looks=looks, max_new_tokens=6)
            for number, engine in enumerate(self.engines())
            for row, looks in enumerate(LOOKS)
        }
        answers: dict[tuple[int, int], list[int]] = {}
        while len(answers) < len(streams):
            for key, stream in streams.items():
                if isinstance(event := next(stream, None), Done):
                    answers[key] = event.answer.ids
        assert answers == {(n, row): fresh[n][row] for n in range(3) for row in range(len(LOOKS))}

    def test_threads_share_nothing(self):
        engines, fresh, found = self.engines(), [ids(engine) for engine in self.engines()], {}
        threads = [
            threading.Thread(target=lambda n=number, e=engine: found.update({n: [ids(e) for _ in range(3)]}))
            for number, engine in enumerate(engines)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: [expected] * 3 for number, expected in enumerate(fresh)}


class TestInterrupted:
    @pytest.mark.parametrize("looks", [[REGION], ["clip"]])
    def test_in_any_layer_of_any_step(self, monkeypatch, looks):
        """Control-C in the middle of a forward pass: half of the layers have written, the length has not moved."""
        engine, append = engine_of(), vpt_model.network.attention.append_visual_kv_
        expected = engine.ask(IMAGE, QUESTION, looks=looks, max_new_tokens=3).ids
        calls = 0

        def interrupted(*arguments, **options) -> None:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise KeyboardInterrupt
            append(*arguments, **options)

        monkeypatch.setattr(vpt_model.network.attention, "append_visual_kv_", interrupted)
        for after in (0, 2, 5, 9, 30, 38):
            calls = after
            with pytest.raises(KeyboardInterrupt):
                engine.ask(IMAGE, QUESTION, looks=looks, max_new_tokens=99)
            assert [cache.length for cache in engine.pool.idle] == [0]
            calls = 10**6
            assert engine.ask(IMAGE, QUESTION, looks=looks, max_new_tokens=3).ids == expected

    @pytest.mark.parametrize("stage", ["look", "reencode", "reencode_into"])
    def test_in_any_stage_of_a_look(self, monkeypatch, stage):
        engine = engine_of()
        expected = ids(engine)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(perception, stage, failing)
            engine.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=6)
        assert [cache.length for cache in engine.pool.idle] == [0] and ids(engine) == expected


def failing(*arguments: object) -> None:
    raise RuntimeError("out of memory")


class TestNaN:
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        """Makes what the next look re-encodes NaN."""

        def reencode_into(model, features, control, embeds, row, count):
            embeds[row : row + count] = NAN

        monkeypatch.setattr(perception, "reencode_into", reencode_into)

    def test_weights(self):
        state = dict(tiny_state())
        state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], NAN)
        answer = engine_of(Model.from_state(tiny_config(), state)).ask(IMAGE, QUESTION, keep_logits=True)
        assert (answer.finish_reason, answer.ids, answer.text, answer.logits) == ("nan", [], "", None)
        assert "NaN" in answer.notices[0] and "weights" in answer.notices[0]

    @pytest.mark.parametrize("options", [{}, {"keep_logits": True}])
    def test_in_a_look_they_end_the_answer_and_nothing_stays(self, monkeypatch, options):
        engine = engine_of()
        expected = ids(engine)
        with monkeypatch.context() as patch:
            self.broken(patch)
            answer = engine.ask(IMAGE, QUESTION, looks=["clip"], **options)
            batch = engine.ask_batch([IMAGE] * 3, [QUESTION] * 3, looks=LOOKS, max_new_tokens=6)
        assert answer.finish_reason == "nan" and answer.ids == [] and [look.kind for look in answer.looks] == ["clip"]
        assert [row.finish_reason == "nan" for row in batch] == [False, True, False]
        assert [batch[0].ids, batch[2].ids] == [expected[0], expected[2]]
        (cache, *_) = engine.pool.idle
        assert cache.keys.isnan().any(), "the rows of the broken look are still there"
        assert ids(engine) == expected

    def test_regions_named_before_are_not_looked_at(self, monkeypatch):
        """A round that breaks down behind a region span has no answer to base a look on."""
        engine, logits = engine_of(), tiny_model().language.logits
        span = list(IDS.region_span(2, 1, 5, 4))
        fed = iter(range(len(span) + 1))
        monkeypatch.setattr(
            engine.model.language,
            "logits",
            lambda hidden: logits(hidden) if next(fed) < len(span) else logits(hidden) * NAN,
            raising=False,
        )
        answer = scripted(engine, span, max_new_tokens=20, keep_logits=True)
        assert (answer.ids, answer.looks, answer.finish_reason) == (span, [], "nan")


class TestLimits:
    def test_a_region_named_when_no_look_is_left(self):
        said = [*IDS.region_span(2, 1, 5, 4), IDS.im_end]
        answer = scripted(engine_of(max_looks=1), said, said)
        assert [look.kind for look in answer.looks] == ["region"] and answer.finish_reason == "looks"
        assert scripted(engine_of(max_looks=0), said).finish_reason == "looks"
        assert scripted(engine_of(max_looks=2), said, said, [65, IDS.im_end]).finish_reason == "stop"

    def test_a_region_that_runs_out_of_tokens_ended_by_them(self):
        said = list(IDS.region_span(2, 1, 5, 4))
        assert scripted(engine_of(max_looks=0), said, max_new_tokens=6).finish_reason == "length"


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 5000, "chat/inside", "no folder/chat", "\ud800"])
def test_a_chat_is_saved_under_no_name_that_no_file_can_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat").write_text("before")
    with engine_of().chat(IMAGE) as chat:
        chat.ask(QUESTION, max_new_tokens=2)
        with pytest.raises(ValueError, match="name a file in") as raised:
            chat.save(name)
    assert len(str(raised.value)) < 900
    assert [path.name for path in tmp_path.iterdir()] == ["chat"] and (tmp_path / "chat").read_text() == "before"


def test_a_chat_replaces_no_device(tmp_path):
    """A file that takes its name when it is complete would take that of /dev/null for good; a pipe stands for it."""
    os.mkfifo(tmp_path / "pipe")
    with engine_of().chat(IMAGE) as chat:
        chat.ask(QUESTION, max_new_tokens=2)
        for place in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(ValueError, match="is a folder or a device"):
                chat.save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
