"""Live conversations: every turn equals one prefill of the whole, whatever was said, seen, forked or undone."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.model.inputs import random_image, tiny_model
from tests.model.watch import CacheTraffic, LiveMemory
from vpt_model.config import ENCODERS
from vpt_model.engine import Answer, Chat, Done, Engine, Sampling, Token
from vpt_model.engine.conversation import Conversation
from vpt_model.engine.executor import Eager
from vpt_model.network.positions import mrope_positions
from vpt_model.text.tokens import Tokenizer

FIRST, SECOND = random_image(150, 230, seed=3), random_image(260, 120, seed=2)
QUESTION = "What is written on the sign?"
REGION, THREE = "region:x2,y1,x5,y4", "region:x2,y1,x5,y4+x0,y0,x0,y0+x7,y6,x6,y7"

CAPACITY, LOOKS = 1 << 15, (None, ["clip"], [REGION], None, None)
"""Room for two hundred turns, and what every five of them look at."""


@pytest.fixture(params=ENCODERS)
def encoder(request) -> str:
    return request.param


def engine_of(encoder: str = "clip", **options) -> Engine:
    kind, options = ENCODERS[encoder], {"capacity": 4096} | options
    model = tiny_model(kind, max_position_embeddings=max(4096, options["capacity"]))
    return Engine(model, Tokenizer.byte_level(320, kind), **options)


class Written:
    """What every conversation was fed: token ids, embeddings and positions, as far as it still stands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: dict[Conversation, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        self.calls: list[int] = []
        states = Eager.states

        def watched(executor, appends):
            for append in appends:
                begin = append.conversation.length
                embeds = executor._embed(append.tokens) if append.embeds is None else append.embeds
                rows = zip(append.tokens, embeds.clone(), append.positions.T)
                self.parts[append.conversation] = [*self.parts.get(append.conversation, [])[:begin], *rows]
            self.calls.append(sum(len(append.tokens) for append in appends))
            return states(executor, appends)

        monkeypatch.setattr(Eager, "states", watched)

    def fork(self, parent: Chat, forks: list[Chat]) -> None:
        for fork in forks:
            self.parts[fork.conversation] = self.parts[parent.conversation][: parent.length]

    def check(self, chat: Chat, answer: Answer) -> None:
        """The answer's logits are those of one prefill, its positions those of one computation."""
        conversation, language = chat.conversation, chat.engine.model.language
        ids, embeds, positions = zip(*self.parts[conversation][: chat.length])
        assert list(ids) == conversation.tokens
        grids, pad = [grid for grid, seen in self.grids(chat)], chat.engine.ids.image_pad
        expected, following = mrope_positions(torch.tensor(ids), grids, 0, pad)
        assert torch.equal(torch.stack(positions, 1), expected) and following == conversation.next_position
        cache = language.new_cache(len(ids))
        hidden = language.forward(torch.stack(embeds), expected, [cache], [len(ids)])
        logits = language.logits(hidden[chat.length - len(answer.ids) :])
        assert (answer.logits - logits).abs().max() <= 1e-4
        assert answer.ids == logits.argmax(-1).tolist()
        if answer.finish_reason == "stop":
            assert answer.ids[-1] == int(logits[-1].argmax())

    def grids(self, chat: Chat) -> Iterator[tuple[tuple[int, int], bool]]:
        """Of every image in the ordinary form, in the order in which they were fed."""
        pictures, seen = iter(chat.conversation.pictures), set()
        for exchange in chat.exchanges:
            for upto in (exchange.before.pictures, self.shown_after(chat, exchange)):
                while len(seen) < upto:
                    seen.add(id(picture := next(pictures)))
                    yield picture.grids[0], True
            for look in exchange.answer.looks:
                if look.kind == "region":
                    yield from ((grid, False) for grid in look.grids)

    @staticmethod
    def shown_after(chat: Chat, exchange) -> int:
        later = (other.before.pictures for other in chat.exchanges[chat.exchanges.index(exchange) + 1 :])
        return next(later, len(chat.conversation.pictures))


@pytest.fixture
def written(monkeypatch) -> Written:
    return Written(monkeypatch)


OPTIONS = {"max_new_tokens": 5, "keep_logits": True}


class TestEqualsOnePrefill:
    def test_six_turns_of_every_kind(self, encoder, written):
        with engine_of(encoder).chat() as chat:
            for question, image, looks in (
                ("Hello?", None, None),
                (QUESTION, FIRST, [encoder]),
                ("And there?", None, [REGION]),
                ("And here?", SECOND, [THREE]),
                ("Once more the first.", 0, [encoder]),
                ("So?", None, None),
            ):
                answer = chat.ask(question, image, looks=looks, **OPTIONS)
                written.check(chat, answer)
                assert [look.kind for look in answer.looks] == (
                    [] if looks is None else [encoder if looks == [encoder] else "region"]
                )
            assert len(chat) == 6 and len(chat.conversation.pictures) == 2

    @pytest.mark.slow
    def test_two_hundred_turns(self, written):
        with engine_of(capacity=CAPACITY).chat(FIRST) as chat:
            for turn in range(200):
                answer = chat.ask("Why?", looks=LOOKS[turn % len(LOOKS)], max_new_tokens=3, keep_logits=True)
                if turn % 10 == 9:
                    written.check(chat, answer)

    def test_forks_and_rewinds(self, encoder, written):
        with engine_of(encoder).chat(FIRST) as chat:
            chat.ask(QUESTION, looks=[REGION], **OPTIONS)
            chat.ask("And there?", looks=[encoder], **OPTIONS)
            forks = chat.fork(2)
            written.fork(chat, forks)
            for one, looks in ((forks[0], [encoder]), (chat, [REGION]), (forks[1], None), (forks[0], None)):
                written.check(one, one.ask("Why?", looks=looks, **OPTIONS))
            (deeper,) = forks[0].fork()
            written.fork(forks[0], [deeper])
            written.check(deeper, deeper.ask("How?", SECOND, looks=[encoder], **OPTIONS))
            for one, turn in ((forks[0], -1), (chat, 1), (deeper, 0), (forks[1], 0)):
                one.rewind(turn)
                written.check(one, one.ask("Again?", FIRST, looks=[encoder], **OPTIONS))

    def test_the_first_turn_is_engine_ask(self, encoder):
        for looks in ([encoder], [REGION], None):
            engine = engine_of(encoder)
            alone = engine.ask(FIRST, QUESTION, looks=looks, **OPTIONS)
            with engine.chat(FIRST) as chat:
                answer = chat.ask(QUESTION, looks=looks, **OPTIONS)
            assert answer.ids == alone.ids and torch.equal(answer.logits, alone.logits)
            assert [stage.work for stage in answer.timings] == [stage.work for stage in alone.timings]
            assert (answer.looks, answer.text, answer.finish_reason) == (alone.looks, alone.text, alone.finish_reason)

    def test_a_batch_over_forks_is_one_ragged_call(self, encoder, written):
        engine = engine_of(encoder)
        with engine.chat(FIRST) as chat:
            chat.ask(QUESTION, **OPTIONS)
            forks = chat.fork(3)
            written.fork(chat, forks)
            written.calls.clear()
            answers = engine.ask_chats(forks, ["Why?", "How?", "Who is it?"], looks=[encoder], **OPTIONS)
            for fork, answer in zip(forks, answers, strict=True):
                written.check(fork, answer)
            fed = sum(fork.length for fork in forks) - 3 * chat.length
            assert sum(written.calls) == fed and len(written.calls) <= 2 + 1 + 5

    def test_best_of_n(self):
        engine = engine_of()
        with engine.chat(FIRST) as chat:
            chat.ask(QUESTION, max_new_tokens=3)
            samplings = [Sampling(1.0, seed=seed) for seed in range(4)]
            answers = engine.ask_chats(chat.fork(4), ["Why?"] * 4, samplings, max_new_tokens=8)
            assert len({tuple(answer.ids) for answer in answers}) > 1
            for sampling, answer in zip(samplings, answers):
                (fork,) = chat.fork()
                assert fork.ask("Why?", sampling=sampling, max_new_tokens=8).ids == answer.ids


class TestWork:
    def test_only_what_is_new_passes_the_model(self, written):
        """A further question costs its own tokens, behind however many."""
        fed, towers = [], []
        with engine_of().chat(FIRST) as chat:
            for _ in range(6):
                written.calls.clear()
                answer = chat.ask(QUESTION, max_new_tokens=1)
                fed.append(sum(written.calls))
                towers.append(sum(stage.work.get("vit_calls", 0) for stage in answer.timings))
        assert len(set(fed[1:])) == 1 and fed[1] < fed[0] and towers == [1, 0, 0, 0, 0, 0]

    def test_what_is_shared_is_read_where_it_lies(self):
        """Neither forking nor growing copies, moves or concatenates a row."""
        with engine_of().chat(FIRST) as chat:
            chat.ask(QUESTION, looks=[REGION], max_new_tokens=3)
            (fork,) = chat.fork()
            with CacheTraffic([chat.conversation.cache]) as traffic:
                fork.ask("Why?", looks=["clip"], max_new_tokens=3)
                chat.conversation.cache.reserve(1000)
                chat.ask("Why?", looks=["clip"], max_new_tokens=3)
            # A new buffer of the old one's form.
            assert traffic.read and set(traffic.other) == {"new_zeros"}

    def test_memory_is_what_is_used_and_comes_back(self):
        engine = engine_of()
        engine.ask(FIRST, QUESTION, max_new_tokens=2)
        memory = LiveMemory()
        with memory:
            chat = engine.chat(FIRST)
            token = chat.conversation.cache.bytes_per_token
            chat.ask(QUESTION, looks=["clip"], max_new_tokens=3)
            assert chat.nbytes == 512 * token + FIRST.nbytes + chat.conversation.pictures[0].features.nbytes
            forks = chat.fork(3)
            assert [fork.nbytes for fork in forks] == [256 * token] * 3
            while chat.length <= 512:
                chat.ask(QUESTION, looks=["clip"], max_new_tokens=3)
            assert chat.conversation.cache.nbytes == (512 + 1024) * token
            chat.close()
            gc.collect()
            held = memory.now
            assert held > (512 + 3 * 256) * token, "the forks still read the first rows"
            forks[0].ask("Why?", max_new_tokens=3)
            del forks, chat
            gc.collect()
            assert memory.now < 64 << 10, "forgotten chats give their memory back"

    @pytest.mark.slow
    def test_two_hundred_turns_and_sixty_four_forks(self):
        """Beside cache and pictures a conversation keeps nothing: not of its turns, forks or what was undone."""
        engine = engine_of(capacity=CAPACITY)
        with engine.chat(FIRST) as chat, LiveMemory() as memory:
            beside = []
            for turn in range(200):
                chat.ask("Why?", looks=LOOKS[turn % len(LOOKS)], max_new_tokens=3)
                if turn % 20 == 19:
                    gc.collect()
                    beside.append(memory.now - chat.nbytes)
            assert set(beside) == {beside[0]}
            before = memory.now
            forks = chat.fork(64)
            answers = engine.ask_chats(forks, ["How?"] * 64, max_new_tokens=3)
            assert memory.now - before < sum(fork.nbytes for fork in forks) + (64 << 10)
            assert {tuple(answer.ids) for answer in answers} == {tuple(chat.ask("How?", max_new_tokens=3).ids)}
            chat.rewind()
            del forks, answers
            gc.collect()
            assert memory.now == before


class TestTurns:
    def test_a_turn_that_is_closed_or_fails_has_not_happened(self, encoder, monkeypatch):
        engine = engine_of(encoder)
        with engine.chat() as chat, engine.chat() as other:
            for one in (chat, other):
                one.ask("Hello?", max_new_tokens=3)
            expected = other.ask(QUESTION, FIRST, looks=[encoder], **OPTIONS)
            length = chat.length
            for taken in range(6):
                stream = chat.stream(QUESTION, FIRST, looks=[encoder], **OPTIONS)
                for _ in range(taken):
                    next(stream)
                stream.close()
                assert (chat.length, len(chat), chat.conversation.pictures) == (length, 1, [])
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(engine.model.language, "logits", lambda hidden: 1 / 0, raising=False)
                chat.ask(QUESTION, FIRST)
            with pytest.raises(ValueError, match="capacity is 4096"):
                chat.ask("long " * 1000)
            answer = chat.ask(QUESTION, FIRST, looks=[encoder], **OPTIONS)
            assert answer.ids == expected.ids and torch.equal(answer.logits, expected.logits)

    def test_rewinding_shows_the_picture_again(self):
        with engine_of().chat(FIRST) as chat:
            first = chat.ask(QUESTION, **OPTIONS)
            chat.ask("Why?", SECOND, max_new_tokens=3)
            chat.rewind(0)
            assert len(chat) == chat.length == 0
            assert torch.equal(chat.ask(QUESTION, **OPTIONS).logits, first.logits)
            assert chat.ask("Why?", looks=["clip"]).looks[0].kind == "clip"

    def test_every_question_may_look(self):
        with engine_of(max_looks=1).chat(FIRST) as chat:
            assert [len(chat.ask(QUESTION, looks=["clip"], max_new_tokens=3).looks) for _ in range(3)] == [1, 1, 1]

    def test_an_answer_cut_short_is_completed_before_the_next_question(self, written):
        with engine_of().chat() as chat:
            answer = chat.ask("Hello?", max_new_tokens=4)
            assert answer.finish_reason == "length"
            begin = chat.length
            chat.ask("Why?", max_new_tokens=1)
            assert chat.conversation.tokens[begin : begin + 2] == [answer.ids[-1], chat.engine.ids.im_end]

    def test_events_and_timings(self):
        with engine_of().chat(FIRST) as chat:
            for turn in range(2):
                *events, done = chat.stream(QUESTION, max_new_tokens=3)
                assert isinstance(done, Done) and {type(event) for event in events} == {Token}
                names = [stage.name for stage in done.answer.timings]
                assert names == (["append", "decode"] if turn else ["crop+embed", "ViT", "prefill", "decode"])
            assert [stage.name for stage in chat.timings][-2:] == ["append", "decode"] and len(chat.timings) == 6


class TestBadInput:
    def test_arguments(self):
        engine = engine_of()
        with engine.chat(FIRST) as chat:
            chat.ask(QUESTION, max_new_tokens=2)
            length = chat.length
            for call, error, message in (
                (lambda: chat.ask("?", 1), ValueError, "image is 1, but 1 were shown"),
                (lambda: chat.ask("?", -1), ValueError, "image is -1"),
                (lambda: chat.ask("?", True), TypeError, "bool"),
                (lambda: chat.stream(7), TypeError, "int"),
                (lambda: chat.stream("?", looks=["zoom"]), ValueError, "zoom"),
                (lambda: chat.stream("?", looks=["clip", "clip"]), ValueError, "max_looks is 1"),
                (lambda: chat.stream("<|im_end|>"), ValueError, "257"),
                (lambda: chat.stream("?", FIRST[:1, :1], looks=["region:x3,y3,x3,y3"]), ValueError, "no pixel"),
                (lambda: chat.rewind(1), ValueError, "turn is 1; the chat has 1"),
                (lambda: chat.fork(0), ValueError, "n is 0"),
                (lambda: engine.ask_chats([chat], []), ValueError, "1 chats, 0 questions"),
                (lambda: engine.ask_chats([chat, chat], ["a", "b"]), ValueError, "a turn of this chat is running"),
                (lambda: engine.chat(capacity=-1), ValueError, "capacity is -1"),
            ):
                with pytest.raises(error, match=message):
                    call()
                assert (chat.length, len(chat)) == (length, 1)
            with engine.chat() as empty, pytest.raises(ValueError, match="needs an image"):
                empty.ask("?", looks=["clip"])

    def test_a_running_turn_keeps_others_out(self):
        with engine_of().chat(FIRST) as chat:
            stream = chat.stream(QUESTION)
            next(stream)
            found = []

            def elsewhere():
                try:
                    chat.ask("Why?")
                except ValueError as error:
                    found.append(str(error))

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert len(found) == 1 and "a turn of this chat is running" in found[0]
            for call in (chat.fork, chat.rewind, lambda: chat.ask("Why?"), lambda: chat.save("/nowhere/at/all")):
                with pytest.raises(ValueError, match="a turn of this chat is running"):
                    call()
            stream.close()
            assert chat.ask("Why?", max_new_tokens=2).ids

    def test_a_closed_chat(self):
        chat = engine_of().chat(FIRST)
        chat.ask(QUESTION, max_new_tokens=2)
        chat.close()
        chat.close()
        for call in (lambda: chat.ask("?"), lambda: chat.stream("?"), chat.fork, chat.rewind, lambda: chat.save("x")):
            with pytest.raises(ValueError, match="closed"):
                call()

    def test_pixels_that_were_not_kept(self, encoder):
        with engine_of(encoder).chat(FIRST, keep_pixels=False) as chat:
            assert chat.ask(QUESTION, looks=[encoder], max_new_tokens=2).looks
            assert chat.conversation.pictures[0].pixels is None
            for look in (REGION, encoder):
                if look == "clip":
                    assert chat.ask("?", looks=[look], max_new_tokens=2).looks, "features are enough"
                    continue
                with pytest.raises(ValueError, match="pixels, which were not kept"):
                    chat.ask("?", looks=[look])

    def test_a_look_that_the_model_asks_for_itself_without_pixels(self, encoder):
        with engine_of(encoder).chat(FIRST, keep_pixels=False) as chat:
            chat.ask(QUESTION, max_new_tokens=2)
            question = chat.engine.question(chat.conversation.pictures[0], "?", max_new_tokens=8)
            question.forced.append([*chat.engine.ids.region_span(1, 1, 3, 3), chat.engine.ids.im_end])
            *_, done = chat._events(chat._turn("?", question))
            assert done.answer.looks == [] and "pixels were not kept" in done.answer.notices[0]


class TestFiles:
    def test_a_restored_chat_goes_on_the_same(self, encoder, tmp_path):
        engine, again = engine_of(encoder), engine_of(encoder)
        with engine.chat(FIRST) as chat:
            chat.ask(QUESTION, looks=[encoder], max_new_tokens=3)
            (fork,) = chat.fork()
            fork.ask("And?", SECOND, max_new_tokens=3)
            for number, one in enumerate((chat, fork)):
                file = tmp_path / f"{number}.chat"
                one.save(file)
                with again.load_chat(file) as restored:
                    assert (restored.length, len(restored)) == (one.length, len(one))
                    assert restored.conversation.mark() == one.conversation.mark()
                    for question, image, looks in (
                        ("Why?", None, [REGION]),
                        ("How?", 0, [encoder]),
                        ("So?", SECOND, None),
                    ):
                        answers = [c.ask(question, image, looks=looks, **OPTIONS) for c in (one, restored)]
                        assert answers[0].ids == answers[1].ids
                        assert (answers[0].logits - answers[1].logits).abs().max() <= 1e-4
                    restored.rewind(0)
                    assert restored.ask(QUESTION, max_new_tokens=2).ids
            assert sorted(path.name for path in tmp_path.iterdir()) == ["0.chat", "1.chat"]

    def test_what_cannot_be_loaded(self, tmp_path):
        with engine_of().chat(FIRST) as chat:
            chat.ask(QUESTION, max_new_tokens=3)
            chat.save(tmp_path / "chat")
        other = Engine(tiny_model("clip", 1), Tokenizer.byte_level(320, "clip"))
        with pytest.raises(ValueError, match="another model"):
            other.load_chat(tmp_path / "chat")
        with pytest.raises(ValueError, match="capacity is 50"):
            engine_of(capacity=50).load_chat(tmp_path / "chat")
        content = (tmp_path / "chat").read_bytes()
        (tmp_path / "cut").write_bytes(content[:-100])
        save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
        with safe_open(tmp_path / "chat", "pt") as stored:
            about = json.loads(stored.metadata()["vpt"])
        save_file(
            load_file(tmp_path / "chat"), tmp_path / "newer", {"vpt": json.dumps(about | {"format": "vpt chat 9"})}
        )
        for name, message in (
            ("cut", "cannot be read"),
            ("none", "cannot be read"),
            ("foreign", "format"),
            ("newer", "vpt chat 9"),
        ):
            with pytest.raises(ValueError, match=message):
                engine_of().load_chat(tmp_path / name)

    def test_a_file_appears_whole_or_not_at_all(self, tmp_path, monkeypatch):
        from vpt_model.engine import store

        with engine_of().chat(FIRST) as chat:
            chat.ask(QUESTION, max_new_tokens=2)
            (tmp_path / "chat").write_text("before")

            def failing(tensors, path, metadata):
                path.write_text("half")
                raise OSError("disk full")

            monkeypatch.setattr(store, "save_file", failing)
            with pytest.raises(OSError, match="disk full"):
                chat.save(tmp_path / "chat")
        assert [path.name for path in tmp_path.iterdir()] == ["chat"] and (tmp_path / "chat").read_text() == "before"
