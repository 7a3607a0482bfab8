"""Every path of the engine against the published procedure, one by one and side by side, forced and freely chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image

from tests.model.engine.scripts import answer_of, question_of, scripted
from tests.model.inputs import random_image, tiny_config, tiny_model, tiny_state
from tests.model.replay import Replay
from vpt_model.config import ENCODERS
from vpt_model.engine import Engine, perception
from vpt_model.engine.events import Answer, Done, Look, Reencode, Token
from vpt_model.engine.sampling import Sampling
from vpt_model.network.model import Model
from vpt_model.published.procedure import PublishedAnswer, PublishedProcedure
from vpt_model.text.tokens import Tokenizer, crop_box, parse_look, parse_region_ids

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
ONE = "region:x2,y1,x5,y4"
THREE = "region:x2,y1,x5,y4+x0,y0,x0,y0+x7,y6,x6,y7"


@pytest.fixture(params=ENCODERS)
def encoder(request) -> str:
    return request.param


def tokenizer(encoder: str) -> Tokenizer:
    return Tokenizer.byte_level(320, ENCODERS[encoder])


def engine_of(encoder: str, **options) -> Engine:
    return Engine(tiny_model(ENCODERS[encoder]), tokenizer(encoder), **options)


def published_of(encoder: str, state: dict[str, torch.Tensor] | None = None) -> PublishedProcedure:
    kind, tokens = ENCODERS[encoder], tokenizer(encoder)
    return PublishedProcedure(tiny_config(kind), state or tiny_state(kind), tokens.ids, tokens)


def agrees(answer: Answer, published: PublishedAnswer) -> None:
    assert answer.ids == published.ids
    assert (answer.logits - torch.stack(published.logits)).abs().max() <= 1e-4
    assert answer.text == published.text
    assert [box for look in answer.looks for box in look.boxes] == published.boxes


@pytest.mark.parametrize("look", [ONE, THREE, "re-encode"])
def test_forced_looks(encoder, look):
    looks = [encoder if look == "re-encode" else look]
    options = {"looks": looks, "max_new_tokens": 8, "keep_logits": True}
    answer = engine_of(encoder).ask(IMAGE, QUESTION, **options)
    agrees(answer, published_of(encoder).ask(Image.fromarray(IMAGE.numpy()), QUESTION, **options))
    assert [seen.kind for seen in answer.looks] == [encoder if look == "re-encode" else "region"]


@dataclass
class Scripted:
    """A model whose own greedy first round is `said`; `state` are its weights."""

    encoder: str
    said: list[int]

    def __post_init__(self) -> None:
        engine, seen = engine_of(self.encoder, max_looks=0), []
        logits = engine.model.language.logits
        # The engine is only a way to see the hidden states from which the tokens will have to be chosen.
        engine.model.language.logits = lambda hidden: seen.append(hidden) or logits(hidden)
        scripted(engine, QUESTION, IMAGE, [self.said], max_new_tokens=99, keep_logits=True)
        del engine.model.language.logits
        hidden = torch.cat(seen)[: len(self.said)].double()
        self.state = dict(tiny_state(ENCODERS[self.encoder]))
        head = self.state["lm_head.weight"].clone()
        for token in set(self.said):
            wanted = torch.tensor([12.0 if said == token else 0.0 for said in self.said], dtype=torch.float64)
            head[token] = torch.linalg.lstsq(hidden, wanted[:, None], driver="gelsd").solution[:, 0].float()
        self.state["lm_head.weight"] = head

    def compare(self, **options) -> tuple[Answer, PublishedAnswer]:
        model = Model.from_state(tiny_config(ENCODERS[self.encoder]), self.state)
        options = {"max_new_tokens": len(self.said) + 6, "keep_logits": True} | options
        answer = Engine(model, tokenizer(self.encoder)).ask(IMAGE, QUESTION, **options)
        published = published_of(self.encoder, self.state).ask(Image.fromarray(IMAGE.numpy()), QUESTION, **options)
        return answer, published


def script(encoder: str, *parts: str) -> list[int]:
    """Ids of texts, of regions ("region:..."), of the "start" of an action, of the "action" token, and a byte that is
    "no character".
    """
    tokens = tokenizer(encoder)
    ids: list[int] = []
    single = {"start": tokens.ids.action_start, "action": tokens.ids.action, "no character": 0xFF}
    for part in parts:
        if part in single:
            ids.append(single[part])
        else:
            ids += parse_look(part, tokens.ids)[:-1] if part.startswith("region:") else tokens.encode(part)
    return ids


class TestFreeChoice:
    """Without a trigger sentence the model itself decides: to answer, to crop or to re-encode."""

    @pytest.mark.parametrize(
        "parts, looks",
        [
            (["A sign."], []),
            ([ONE], ["region"]),
            (["See ", THREE, " there"], ["region"]),
            (["start"], ["re-encode"]),
            (["Hm ", "start"], ["re-encode"]),
            (["<|region_token_start|><|x_2|><|y_3|>"], []),
            (["<|region_token_start|><|x_2|><|x_3|><|region_token_end|>"], []),
            ([ONE, "<|region_token_start|><|y_3|><|region_token_end|>"], []),
        ],
        ids=[
            "direct",
            "region",
            "regions in text",
            "action",
            "text, action",
            "unterminated",
            "no row",
            "one no column",
        ],
    )
    def test_agrees_with_the_published_procedure(self, encoder, parts, looks):
        said = script(encoder, *parts)
        end = [] if parts[-1] == "start" else [tokenizer(encoder).ids.im_end]
        answer, published = Scripted(encoder, said + end).compare()
        assert published.rounds[0].ids[: len(said)] == said
        agrees(answer, published)
        assert [look.kind for look in answer.looks] == [encoder if look == "re-encode" else look for look in looks]
        assert len(answer.notices) == (1 if "no " in str(parts) or parts[-1].endswith("<|region_token_end|>") else 0)

    @pytest.mark.parametrize("ended", [True, False], ids=["stop", "length"])
    @pytest.mark.parametrize(
        "parts",
        [
            [ONE, "action"],
            [ONE, "action", " there"],
            ["action", THREE],
            ["no character", ONE, "action", " there"],
            ["no character", "action", ONE],
            ["action", "no character", ONE],
        ],
        ids=", ".join,
    )
    def test_a_region_beside_an_action_token_without_its_start(self, encoder, parts, ended):
        """The second round reads the answer: there, too, the action token's input is the state of the token before."""
        said = script(encoder, *parts)
        model = Scripted(encoder, [*said, tokenizer(encoder).ids.im_end])
        answer, published = model.compare(max_new_tokens=len(said) + ended)
        assert published.rounds[0].ids[: len(said)] == said
        # What the second round says may hold two action tokens in a row, which the published code takes otherwise.
        assert (answer.logits[0] - published.logits[0]).abs().max() <= 1e-4
        assert [box for look in answer.looks for box in look.boxes] == published.boxes != []


def requests(encoder: str) -> dict[str, list]:
    """Rows on every path, of different lengths."""
    questions = [QUESTION, "Why?", f"{QUESTION} Be brief.", QUESTION, "Which one?", QUESTION]
    images = [IMAGE, random_image(90, 300, seed=1), IMAGE, random_image(260, 120, seed=2), None, IMAGE]
    return {"images": images, "questions": questions, "looks": [[ONE], None, [encoder], [THREE], None, [encoder]]}


class TestBatch:
    @pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_k=20, seed=5)], ids=["greedy", "sampled"])
    def test_every_row_equals_its_single_run(self, encoder, sampling):
        engine, rows = engine_of(encoder), requests(encoder)
        options = {"max_new_tokens": 8, "keep_logits": True, "sampling": sampling}
        batch = engine.ask_batch(**rows, **options)
        for answer, image, question, looks in zip(batch, *rows.values(), strict=True):
            alone = engine.ask(image, question, looks=looks, **options)
            assert (answer.ids, answer.text, answer.first_text) == (alone.ids, alone.text, alone.first_text)
            assert (answer.logits - alone.logits).abs().max() <= 1e-4
            assert (answer.looks, answer.finish_reason) == (alone.looks, alone.finish_reason)
            assert [stage.name for stage in answer.timings] == [stage.name for stage in alone.timings]
        assert len({len(answer.ids) for answer in batch}) > 1 or len({answer.text for answer in batch}) > 1

    def test_rows_share_every_call_without_padding(self, encoder, monkeypatch):
        engine, rows, fed = engine_of(encoder), requests(encoder), []
        language = engine.model.language
        forward = language.forward
        monkeypatch.setattr(language, "forward", lambda *args: fed.append(args[3]) or forward(*args))
        for image, question, looks in zip(*rows.values(), strict=True):
            engine.ask(image, question, looks=looks, max_new_tokens=4)
        alone, fed[:] = list(fed), []
        engine.ask_batch(**rows, max_new_tokens=4)
        assert sum(map(sum, fed)) == sum(map(sum, alone))
        assert sum(map(len, fed)) == len(alone) and len(fed) < len(alone) / 2
        assert len(fed[0]) == len(rows["images"]) == len(set(fed[0])) + 1 or len(set(fed[0])) > 3

    def test_a_row_that_does_not_fit_ends_the_batch_before_anything_is_written(self, encoder):
        engine = engine_of(encoder, capacity=150)
        with pytest.raises(ValueError, match="capacity"):
            engine.ask_batch([None, None], ["short", "long " * 60])
        assert len(engine.pool.idle) == 2
        assert not any(cache.keys.any() or cache.length for cache in engine.pool.idle)

    def test_bad_batches(self, encoder):
        engine = engine_of(encoder)
        assert engine.ask_batch([], []) == []
        with pytest.raises(ValueError, match="2 images, 1 questions"):
            engine.ask_batch([IMAGE, IMAGE], [QUESTION])
        with pytest.raises(ValueError, match="1 lists of looks"):
            engine.ask_batch([IMAGE, IMAGE], [QUESTION] * 2, looks=[[ONE]])
        with pytest.raises(ValueError, match="'zoom'"):
            engine.ask_batch([IMAGE, IMAGE], [QUESTION] * 2, looks=[[ONE], ["zoom"]])

    def test_an_abandoned_batch_gives_its_caches_back(self, encoder):
        engine = engine_of(encoder)
        together = engine.events([engine.question(IMAGE, QUESTION, [look], 4) for look in (ONE, encoder)])
        for _ in range(5):
            next(together)
        together.close()
        assert [cache.length for cache in engine.pool.idle] == [0, 0]

    def test_actions_without_their_start_beside_other_rows(self, encoder):
        """In a row that is read again the action token's input is a state, and the rows beside it are as ever."""
        engine = engine_of(encoder)
        said = [
            script(encoder, *parts) for parts in (["no character", "action", ONE, "action"], [ONE], ["a", "action"])
        ]

        def asked(row):
            options = {"max_new_tokens": len(said[row]), "keep_logits": True}
            return question_of(engine, QUESTION, IMAGE, [said[row]], **options)

        together = {row: e.answer for row, e in engine.events([asked(0), asked(1), asked(2)]) if isinstance(e, Done)}
        for row in range(3):
            alone = answer_of(engine, asked(row))
            assert (together[row].ids, together[row].looks) == (alone.ids, alone.looks)
            assert (together[row].logits - alone.logits).abs().max() <= 1e-4
        assert [len(together[row].looks) for row in range(3)] == [1, 1, 0]


class TestStream:
    def test_events_come_in_order(self, encoder):
        events = list(engine_of(encoder).stream(IMAGE, QUESTION, looks=[encoder], max_new_tokens=2))
        told = [Token, Reencode, Look]
        assert [type(event) for event in events] == [*told, *[Token] * (len(events) - 4), Done]
        assert events[1] == Reencode(encoder) and events[2] in events[-1].answer.looks

    def test_it_can_be_cancelled_at_every_event(self, encoder):
        engine = engine_of(encoder)
        options = {"looks": [encoder], "max_new_tokens": 4}
        expected = engine.ask(IMAGE, QUESTION, **options)
        total = sum(1 for _ in engine.stream(IMAGE, QUESTION, **options))
        for taken in range(total):
            stream = engine.stream(IMAGE, QUESTION, **options)
            for _ in range(taken):
                next(stream)
            if taken % 2:
                stream.close()
            del stream
            assert [cache.length for cache in engine.pool.idle] == [0]
        assert engine.ask(IMAGE, QUESTION, **options).ids == expected.ids

    def test_an_error_in_the_middle_frees_the_cache(self, encoder, monkeypatch):
        engine = engine_of(encoder)
        stream = engine.stream(IMAGE, QUESTION, looks=[encoder], max_new_tokens=4)
        next(stream)
        monkeypatch.setattr(perception, "reencode_into", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream)
        assert [cache.length for cache in engine.pool.idle] == [0]


@pytest.mark.parametrize("looks", [(ONE, "re-encode"), ("re-encode", THREE), ("re-encode", "re-encode")])
def test_more_looks_than_published(encoder, looks):
    """Each look has a control state of its own; the whole equals one prefill of the same embeddings."""
    engine, kind = engine_of(encoder, max_looks=2), ENCODERS[encoder]
    replay = Replay(engine, QUESTION, IMAGE, tiny_state(kind))
    for look in looks:
        if look == "re-encode":
            replay.action()
        else:
            span, (height, width, _) = parse_look(look, engine.ids)[:-1], IMAGE.shape
            replay.add(span)
            replay.region([crop_box(region, width, height) for region in parse_region_ids(span, engine.ids)])
    forced = [encoder if look == "re-encode" else look for look in looks]
    answer = engine.ask(IMAGE, QUESTION, looks=forced, max_new_tokens=8, keep_logits=True)
    replay.check(answer)
    assert [look.kind for look in answer.looks] == [encoder if look == "re-encode" else "region" for look in looks]


def test_the_action_token_in_the_middle_of_an_answer(encoder):
    """Behind the last look an action start asks for nothing, but the action and its state follow as in training."""
    engine = engine_of(encoder)
    replay = Replay(engine, QUESTION, IMAGE, tiny_state(ENCODERS[encoder]))
    replay.action()
    start = [*engine.tokenizer.encode("so"), engine.ids.action_start]
    replay.add(start)
    forced = [[engine.ids.action_start], start]
    answer = scripted(engine, QUESTION, IMAGE, forced, max_new_tokens=10, keep_logits=True)
    assert answer.ids[:4] == [*start, engine.ids.action] and len(answer.looks) == 1
    replay.check(replace(answer, ids=answer.ids[3:], logits=answer.logits[3:]))


def test_sampling_is_seeded(encoder):
    engine, options = engine_of(encoder), {"looks": [encoder], "max_new_tokens": 12}

    def ids(sampling: Sampling | None) -> list[int]:
        return engine.ask(IMAGE, QUESTION, sampling=sampling, **options).ids

    assert ids(Sampling(1.0, seed=1)) == ids(Sampling(1.0, seed=1)) != ids(Sampling(1.0, seed=2))
    assert ids(Sampling(0.95, 10, 0.1, seed=3)) == ids(None) != ids(Sampling(1.0, seed=1))
    *_, done = engine.stream(IMAGE, QUESTION, sampling=Sampling(1.0, seed=1), **options)
    assert done.answer.ids == ids(Sampling(1.0, seed=1))


def test_no_looks(encoder):
    """`max_looks=0` answers in one round; a look that is chosen then stays text, with the action token forced."""
    ids = tokenizer(encoder).ids
    state = Scripted(encoder, [ids.action_start]).state
    engine = Engine(Model.from_state(tiny_config(ENCODERS[encoder]), state), tokenizer(encoder), max_looks=0)
    answer = engine.ask(IMAGE, QUESTION, max_new_tokens=4)
    assert answer.ids[:2] == [ids.action_start, ids.action] and answer.looks == []


def test_perception_tokens_do_not_end_a_round(encoder):
    ids = tokenizer(encoder).ids
    plain = [ids.region_start, ids.region_end, *ids.x, *ids.y, ids.action_end, ids.action]
    assert not ids.stop & {*plain, ids.action_start} and ids.kind_pad in ids.stop
    engine = engine_of(encoder)
    answer = scripted(engine, "a", None, [[*plain, ids.im_end]], max_new_tokens=len(plain))
    assert answer.ids == [*plain, ids.im_end] and answer.finish_reason == "stop"


def test_a_question_holds_no_action_token(encoder):
    """Its input is a state of the model, never an embedding of its own, which a prompt would give it."""
    engine, kind = engine_of(encoder), ENCODERS[encoder]
    for ask in (engine.ask, lambda image, text: engine.chat(image).ask(text)):
        with pytest.raises(ValueError, match=rf"special tokens \(ids \[{engine.ids.action}\]\): remove them"):
            ask(IMAGE, f"what is <|{kind}_action|>?")
    assert engine.ask(IMAGE, f"what is <|{kind}_action_end|>?", max_new_tokens=1).ids
