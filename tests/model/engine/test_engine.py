"""The engine against one prefill of the whole conversation, and its behaviour on every path."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from tests.model.engine import scripts
from tests.model.engine.scripts import Wrapped, events_of, question_of
from tests.model.inputs import random_image, tiny_config, tiny_model, tiny_state
from tests.model.replay import Replay
from vpt_model.engine import Engine
from vpt_model.engine.events import Answer, Done, Look, Reencode, Region, Token
from vpt_model.engine.requests import ReencodeAndAppend
from vpt_model.network.cache import KVCache
from vpt_model.network.model import Model
from vpt_model.text.prompt import ANSWER_PREFIX, REGION_TRIGGER, PromptFormat, first_round, region_round
from vpt_model.text.tokens import Tokenizer, crop_box, parse_look, parse_region_ids

MODEL = tiny_model()
TOKENIZER = Tokenizer.byte_level(320, "clip")
IDS = TOKENIZER.ids
IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
ONE = "region:x2,y1,x5,y4"
THREE = "region:x2,y1,x5,y4+x0,y0,x0,y0+x7,y6,x6,y7"


@pytest.fixture
def engine() -> Engine:
    return Engine(MODEL, TOKENIZER)


def state_in(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tiny_state().items()}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def exact(request) -> Engine:
    """An engine whose logits are checked; in float64 rounding can neither hide a difference nor make one."""
    return Engine(Model.from_state(tiny_config(), state_in(request.param)), TOKENIZER)


def scripted(engine: Engine, *rounds: list[int], image: torch.Tensor | None = IMAGE, **options) -> Answer:
    """The answer when the model generates the tokens of `rounds`, whether they are allowed as forced looks or not."""
    options = {"max_new_tokens": 8, "keep_logits": True} | options
    return scripts.scripted(engine, QUESTION, image, rounds, **options)


def replay_of(engine: Engine, image: torch.Tensor | None = IMAGE) -> Replay:
    return Replay(engine, QUESTION, image, state_in(engine.model.dtype))


def prompt(image_tokens: int | None) -> list[int]:
    form = PromptFormat()
    user = TOKENIZER.encode(form.user_text(QUESTION, image_tokens is not None))
    return first_round(IDS, TOKENIZER.encode(form.system), user, image_tokens)


def boxes_of(spec: str) -> list[tuple[int, int, int, int]]:
    height, width, _ = IMAGE.shape
    return [crop_box(span, width, height) for span in parse_region_ids(parse_look(spec, IDS), IDS)]


@pytest.mark.parametrize(("limit", "reason"), [(3, "length"), (12, "stop")])
def test_direct_answer(exact, limit, reason):
    answer = exact.ask(IMAGE, QUESTION, max_new_tokens=limit, keep_logits=True)
    replay_of(exact).check(answer)
    assert answer.finish_reason == reason
    assert (len(answer.ids) == limit) if reason == "length" else answer.ids[-1] in IDS.stop
    assert answer.looks == [] and answer.notices == [] and answer.text == answer.first_text


def test_question_without_an_image(exact):
    answer = exact.ask(None, QUESTION, max_new_tokens=8, keep_logits=True)
    replay_of(exact, image=None).check(answer)
    assert [stage.name for stage in answer.timings] == ["prefill", "decode"]


@pytest.mark.parametrize("spec", [ONE, THREE])
def test_region(exact, spec):
    answer = exact.ask(IMAGE, QUESTION, looks=[spec], max_new_tokens=10, keep_logits=True)
    replay = replay_of(exact)
    replay.add(parse_look(spec, IDS)[:-1])
    replay.region(boxes_of(spec))
    replay.check(answer)
    (look,) = answer.looks
    assert look.kind == "region" and list(look.boxes) == boxes_of(spec)
    assert look.tokens == sum(height * width // 4 for height, width in look.grids)
    assert answer.first_text == TOKENIZER.decode(parse_look(spec, IDS))


def test_re_encoding(exact):
    answer = exact.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=10, keep_logits=True)
    replay = replay_of(exact)
    replay.action()
    replay.check(answer)
    (look,) = answer.looks
    assert (look.kind, look.boxes, look.appended) == ("clip", (), look.tokens + 15)


def test_a_plain_model_takes_regions_only():
    engine = Engine(tiny_model(None), Tokenizer.byte_level(320, None))
    assert [look.kind for look in engine.ask(IMAGE, QUESTION, looks=[ONE], max_new_tokens=6).looks] == ["region"]
    with pytest.raises(ValueError, match="look is 'clip'"):
        engine.ask(IMAGE, QUESTION, looks=["clip"])


def test_two_looks_in_one_conversation(exact):
    answer = Engine(exact.model, TOKENIZER, max_looks=2).ask(
        IMAGE, QUESTION, looks=[ONE, "clip"], max_new_tokens=10, keep_logits=True
    )
    replay = replay_of(exact)
    replay.add(parse_look(ONE, IDS)[:-1])
    replay.region(boxes_of(ONE))
    replay.action()
    replay.check(answer)
    assert [look.kind for look in answer.looks] == ["region", "clip"]


def test_the_trigger_sentence_and_the_separators_reach_the_prompt():
    engine = Engine(MODEL, TOKENIZER, prompt=PromptFormat(trigger=REGION_TRIGGER, trigger_separator=" "))
    written = Engine(MODEL, TOKENIZER).ask(IMAGE, f"{QUESTION} {REGION_TRIGGER}", keep_logits=True)
    assert torch.equal(engine.ask(IMAGE, QUESTION, keep_logits=True).logits, written.logits)


def test_text_before_an_action_is_forgotten(engine):
    expected = engine.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=8, keep_logits=True)
    answer = scripted(engine, [*TOKENIZER.encode("I need more"), IDS.action_start])
    assert answer.ids == expected.ids and torch.equal(answer.logits, expected.logits)
    assert answer.first_text == "I need more<|clip_action_start|>"


def test_the_first_action_ends_a_round_that_also_names_a_region(engine):
    answer = scripted(engine, [*IDS.region_span(1, 1, 2, 2), IDS.action_start])
    assert [look.kind for look in answer.looks] == ["clip"]


def test_text_around_a_region_stays(exact):
    said = [*TOKENIZER.encode("Look: "), *IDS.region_span(2, 1, 5, 4), *TOKENIZER.encode(" there")]
    answer = scripted(exact, [*said, IDS.im_end])
    replay = replay_of(exact)
    replay.add(said)
    replay.region(boxes_of(ONE))
    replay.check(answer)


def test_a_region_counts_when_the_round_runs_out_of_tokens(exact):
    answer = scripted(exact, list(IDS.region_span(2, 1, 5, 4)), max_new_tokens=6)
    replay = replay_of(exact)
    replay.add(list(IDS.region_span(2, 1, 5, 4)))
    replay.region(boxes_of(ONE))
    replay.check(answer)


def test_text_that_is_tokenized_differently_the_second_time_is_read_again(exact):
    answer = scripted(exact, [0xFF, *IDS.region_span(2, 1, 5, 4), IDS.im_end])
    replay = replay_of(exact)
    replay.add([*"\ufffd".encode(), *IDS.region_span(2, 1, 5, 4)])
    replay.region(boxes_of(ONE))
    replay.check(answer)


@pytest.mark.parametrize("max_looks, image", [(0, IMAGE), (1, None)], ids=["no looks left", "no image"])
def test_an_action_without_a_look_is_followed_by_the_action_token_with_the_control_state(exact, max_looks, image):
    start = [*TOKENIZER.encode("so"), IDS.action_start]
    answer = scripted(Engine(exact.model, TOKENIZER, max_looks=max_looks), start, image=image, max_new_tokens=10)
    assert answer.ids[:4] == [*start, IDS.action] and answer.looks == []
    replay = replay_of(exact, image)
    replay.add(start)
    replay.check(replace(answer, ids=answer.ids[3:], logits=answer.logits[3:]))


def test_an_action_in_the_answer_after_the_last_look(exact):
    answer = scripted(exact, parse_look("clip", IDS), [IDS.action_start], max_new_tokens=6)
    assert answer.ids[:2] == [IDS.action_start, IDS.action] and len(answer.looks) == 1
    replay = replay_of(exact)
    replay.action()
    replay.add([IDS.action_start])
    replay.check(replace(answer, ids=answer.ids[1:], logits=answer.logits[1:]))


@pytest.mark.parametrize(
    "tokens, notices",
    [
        ([IDS.region_start, IDS.x[2], IDS.x[3], IDS.region_end], 1),
        ([*IDS.region_span(1, 1, 2, 2), IDS.region_start, IDS.y[2], IDS.region_end], 1),
        ([IDS.region_start, IDS.x[2], IDS.y[3]], 0),
        ([IDS.region_start, IDS.region_end], 0),
        ([IDS.x[2], IDS.y[3], IDS.region_end], 0),
    ],
    ids=["no row", "one of two without a column", "unterminated", "empty", "no start"],
)
def test_regions_that_cannot_be_cropped_leave_the_first_answer(engine, tokens, notices):
    answer = scripted(engine, [*tokens, IDS.im_end])
    assert answer.looks == [] and answer.finish_reason == "stop"
    assert answer.text == answer.first_text == TOKENIZER.decode(tokens)
    assert len(answer.notices) == notices and all("no second look" in notice for notice in answer.notices)


def test_every_token_passes_the_language_model_once(engine, monkeypatch):
    fed = []
    forward = MODEL.language.forward
    monkeypatch.setattr(MODEL.language, "forward", lambda *args: fed.append(args[3]) or forward(*args), raising=False)
    answer = engine.ask(IMAGE, QUESTION, looks=[THREE], max_new_tokens=5)
    frame = region_round(IDS, [height * width // 4 for height, width in answer.looks[0].grids], TOKENIZER.encode)
    first = prompt(answer.timings[1].work["vit_patches"] // 4)
    assert fed == [[len(first)], [18 + len(frame)], *[[1]] * 4]
    assert sum(stage.work.get("tokens", 0) for stage in answer.timings) == sum(count for (count,) in fed)
    assert sum(stage.work.get("lm_calls", 0) for stage in answer.timings) == len(fed)


@pytest.mark.parametrize("max_looks", [0, 1])
@pytest.mark.parametrize(
    "said",
    [
        TOKENIZER.encode("Well, so"),
        parse_look(THREE, IDS),
        [*TOKENIZER.encode("Ah "), *parse_look(ONE, IDS)[:-1], *TOKENIZER.encode(" there")],
        [*TOKENIZER.encode("Hm "), IDS.action_start, *TOKENIZER.encode("and so on")],
        [*TOKENIZER.encode("Hm "), IDS.action, *TOKENIZER.encode("unannounced")],
        [*parse_look(ONE, IDS)[:-1], IDS.action_start],
    ],
    ids=["text", "regions", "a region in text", "an action", "an action without its start", "a region, an action"],
)
def test_forced_tokens_are_fed_together(engine, said, max_looks):
    """What they say, and what is in the cache behind them, is as if they had been fed one by one.

    Those behind which the answer ends are not fed at all, until the conversation goes on.
    """
    found = []
    for keep_logits in (False, True):
        engine.pool.idle = [KVCache(MODEL.config, 1024)]
        options = {"max_new_tokens": len(said) + 8, "max_looks": max_looks, "keep_logits": keep_logits}
        answer = scripted(engine, said, **options)
        cache, calls = engine.pool.idle[-1], sum(stage.work.get("lm_calls", 0) for stage in answer.timings)
        found.append((answer, calls, cache.keys, cache.values))
    (together, few, *rows), (apart, many, *expected) = found
    assert together.ids == apart.ids and [turn.kind for turn in together.looks] == [turn.kind for turn in apart.looks]
    assert (together.text, together.finish_reason, together.notices) == (apart.text, apart.finish_reason, apart.notices)
    assert few <= many - 3
    fed = sum(stage.work.get("tokens", 0) for stage in together.timings)
    for ours, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(ours[:, :fed], theirs[:, :fed], rtol=1e-4, atol=1e-5)


def test_forced_tokens_end_where_the_cache_does():
    said = TOKENIZER.encode("one by one or all at once")
    for room in (0, 1, 5):
        capacity = len(prompt(None)) + room
        for keep_logits in (False, True):
            answer = scripted(Engine(MODEL, TOKENIZER, capacity=capacity), said, image=None, keep_logits=keep_logits)
            assert (answer.ids, answer.finish_reason) == (said[: room + 1], "capacity")


def test_the_clip_path_runs_the_tower_once(engine):
    answer = engine.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=3)
    assert [stage.name for stage in answer.timings] == ["crop+embed", "ViT", "prefill", "perceive", "append", "decode"]
    assert sum(stage.work.get("vit_calls", 0) for stage in answer.timings) == 1
    assert answer.timings[3].work == {"tokens": 1, "lm_calls": 1, "features": answer.looks[0].tokens}
    assert answer.timings[4].work == {"tokens": answer.looks[0].tokens + 14, "lm_calls": 1}


def test_events_come_in_order(engine):
    kinds = [type(event) for event in engine.stream(IMAGE, QUESTION, looks=[ONE], max_new_tokens=2)]
    assert kinds == [*[Token] * 7, Region, Look, Token, Token, Done]
    kinds = [type(event) for event in engine.stream(IMAGE, QUESTION, looks=["clip"], max_new_tokens=2)]
    assert kinds == [Token, Reencode, Look, Token, Token, Done]


def test_streamed_text_is_the_answer_text(engine):
    said = TOKENIZER.encode("Café – 漢字 ") + [0xFF, 0xC3]
    events = events_of(engine, question_of(engine, QUESTION, IMAGE, [[*said, IDS.im_end]]))
    texts = [event.text for event in events[:-1]]
    assert texts[:5] == ["C", "a", "f", "", "é"]
    assert "".join(texts) == events[-1].answer.text == "Café – 漢字 \ufffd\ufffd"


def test_the_trained_prefix_is_stripped_for_users(engine):
    said = [*TOKENIZER.encode(ANSWER_PREFIX + "A cat"), IDS.im_end]
    assert scripted(engine, said).text == "A cat"
    assert scripted(Engine(MODEL, TOKENIZER, keep_prefix=True), said).text == ANSWER_PREFIX + "A cat"


@pytest.mark.parametrize("stop", sorted(IDS.stop))
def test_every_stop_token_ends_a_round(engine, stop):
    answer = scripted(engine, [65, stop, 66])
    assert (answer.ids, answer.text, answer.finish_reason) == ([65, stop], "A", "stop")


def test_rows_behind_the_conversation_never_matter(engine):
    expected = [
        engine.ask(IMAGE, QUESTION, looks=[look], keep_logits=True, max_new_tokens=6) for look in (THREE, "clip")
    ]
    for look, answer in zip((THREE, "clip"), expected, strict=True):
        (cache,) = engine.pool.idle
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        again = engine.ask(IMAGE, QUESTION, looks=[look], keep_logits=True, max_new_tokens=6)
        assert again.ids == answer.ids and torch.equal(again.logits, answer.logits)


def test_abandoned_streams_leave_the_engine_usable(engine):
    expected = engine.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=4)
    for events in range(8):
        stream = engine.stream(IMAGE, QUESTION, looks=["clip"], max_new_tokens=4)
        for _ in range(events):
            next(stream)
        stream.close()
    del stream
    assert engine.ask(IMAGE, QUESTION, looks=["clip"], max_new_tokens=4).ids == expected.ids
    assert [cache.length for cache in engine.pool.idle] == [0]


def test_interleaved_streams_share_nothing(engine):
    expected = [engine.ask(IMAGE, QUESTION, looks=[look], max_new_tokens=6).ids for look in (ONE, "clip")]
    streams = [engine.stream(IMAGE, QUESTION, looks=[look], max_new_tokens=6) for look in (ONE, "clip")]
    answers: dict[int, list[int]] = {}
    while len(answers) < 2:
        for i, stream in enumerate(streams):
            if isinstance(event := next(stream, None), Done):
                answers[i] = event.answer.ids
    assert [answers[0], answers[1]] == expected
    assert len(engine.pool.idle) == 2


class TestCapacity:
    def test_a_prompt_that_does_not_fit_writes_nothing(self):
        engine = Engine(MODEL, TOKENIZER, capacity=64)
        stream = engine.stream(IMAGE, QUESTION)
        with pytest.raises(ValueError, match="capacity"):
            next(stream)
        (cache,) = engine.pool.idle
        assert cache.length == 0 and not cache.keys.any() and not cache.values.any()

    def test_decoding_stops_when_the_cache_is_full(self):
        roomy = Engine(MODEL, TOKENIZER).ask(IMAGE, QUESTION, max_new_tokens=50)
        length = roomy.timings[2].work["tokens"]
        answer = Engine(MODEL, TOKENIZER, capacity=length + 3).ask(IMAGE, QUESTION, max_new_tokens=50)
        assert answer.finish_reason == "capacity" and answer.ids == roomy.ids[:4]

    @pytest.mark.parametrize("look", [ONE, "clip"])
    def test_a_look_that_does_not_fit_is_not_taken(self, look):
        roomy = Engine(MODEL, TOKENIZER).ask(IMAGE, QUESTION, looks=[look], max_new_tokens=1)
        needed = sum(stage.work.get("tokens", 0) for stage in roomy.timings)
        answer = Engine(MODEL, TOKENIZER, capacity=needed).ask(IMAGE, QUESTION, looks=[look], max_new_tokens=1)
        assert answer.ids == roomy.ids
        answer = Engine(MODEL, TOKENIZER, capacity=needed - 1).ask(IMAGE, QUESTION, looks=[look], max_new_tokens=1)
        assert answer.finish_reason == "capacity" and answer.looks == []
        assert answer.text == answer.first_text == roomy.first_text
        assert f"capacity >= {needed}" in answer.notices[0]


class TestFaults:
    """One corrupted step, injected by an executor around the right one, must show in the logits."""

    @pytest.mark.parametrize("fault", ["control", "position", "slot"])
    def test_a_corrupted_step_shows(self, engine, fault):
        class WrongControl(Wrapped):
            def run(self, requests):
                results = super().run(requests)
                return [
                    replace(result, control=result.control.roll(1, -1))
                    if isinstance(result, ReencodeAndAppend)
                    else result
                    for result in results
                ]

        class WrongPosition(Wrapped):
            def run(self, requests):
                for request in requests:
                    if isinstance(request, ReencodeAndAppend) and request.control is not None:
                        request.positions.add_(1)
                return super().run(requests)

        class WrongSlot(Wrapped):
            def run(self, requests):
                for request in requests:
                    request.conversation.cache.slots = partial(self.swapped, request.conversation.cache)
                return super().run(requests)

            def swapped(self, cache, count):
                slots = KVCache.slots(cache, count)
                return slots.flip(0) if cache.length and count > 1 else slots

        wrapper = {"control": WrongControl, "position": WrongPosition, "slot": WrongSlot}[fault]
        faulty = Engine(MODEL, TOKENIZER)
        faulty.executor = wrapper(faulty.executor)
        options = {"looks": ["clip"], "max_new_tokens": 4, "keep_logits": True}
        right = engine.ask(IMAGE, QUESTION, **options)
        wrong = faulty.ask(IMAGE, QUESTION, **options)
        assert (right.logits[0] - wrong.logits[0]).abs().max() > 1e-2


def png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((None, QUESTION), {"looks": ["clip"]}, ValueError, "needs an image"),
        ((None, QUESTION), {"looks": [ONE]}, ValueError, "needs an image"),
        ((IMAGE, QUESTION), {"looks": ["clip", ONE]}, ValueError, "max_looks is 1"),
        ((IMAGE, QUESTION), {"looks": ["zoom"]}, ValueError, "zoom"),
        ((IMAGE, QUESTION), {"looks": ["region:x2,y1,x9,y4"]}, ValueError, "0..7"),
        ((IMAGE[:1, :1], QUESTION), {"looks": ["region:x3,y3,x3,y3"]}, ValueError, "no pixel"),
        ((IMAGE, QUESTION), {"max_new_tokens": 0}, ValueError, "at least 1"),
        ((IMAGE, f"What<|im_end|>{QUESTION}"), {}, ValueError, "257"),
        ((IMAGE, "<|image_pad|>"), {}, ValueError, "261"),
        ((IMAGE, "<|clip_image_pad|>"), {}, ValueError, "271"),
        ((IMAGE, 7), {}, TypeError, "int"),
        ((IMAGE.float(), QUESTION), {}, TypeError, "float32"),
        ((IMAGE[..., 0], QUESTION), {}, ValueError, "height, width, 3"),
        ((png(IMAGE)[:-500], QUESTION), {}, ValueError, "cannot be decoded"),
        ((Image.new("1", (10_000, 10_000)), QUESTION), {}, ValueError, "100000000 pixels"),
        (("/nowhere.png", QUESTION), {}, ValueError, "nowhere"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_bad_requests_fail_before_anything_runs(engine, arguments, options, error, message):
    with pytest.raises(error, match=message):
        engine.stream(*arguments, **options)
    (cache,) = engine.pool.idle
    assert not cache.keys.any()


def test_bad_engines():
    with pytest.raises(ValueError, match="they must agree"):
        Engine(MODEL, Tokenizer.byte_level(320, "seg"))
    with pytest.raises(ValueError, match="max_looks is -1"):
        Engine(MODEL, TOKENIZER, max_looks=-1)
    with pytest.raises(ValueError, match="capacity is 0"):
        Engine(MODEL, TOKENIZER, capacity=0)
