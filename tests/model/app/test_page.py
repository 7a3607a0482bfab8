"""`vpt app` by HTTP: what is told of an answer, conversations, and several people at once."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.model.app.page_server import COUNT, SEED, TAG, Visitor, answerer, events, paced, served, until
from vpt_model.app.page.command import make_answerer
from vpt_model.app.page.sessions import Limits
from vpt_model.app.seen import fed
from vpt_model.app.terminal import MINI
from vpt_model.mini.scenes import KINDS, make_question, make_scene


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as (_, address):
        yield address


@pytest.fixture
def visitor(address: str) -> Visitor:
    return Visitor(address)


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_a_region_is_told_when_it_is_looked_at(visitor: Visitor) -> None:
    picture = visitor.example()
    scene = make_scene(SEED, "test")
    assert (pixels(picture["preview"]) == scene.pixels).all()
    messages = visitor.ask(TAG, picture)
    names = [message["event"] for message in messages]
    assert names[:2] == ["started", "first"] and names[-1] == "done"
    order = [names.index(name) for name in ("token", "region", "crop", "look")]
    assert order == sorted(order) and "token" in names[names.index("look") :]
    assert [m["perception"] for m in events(messages, "token") if m.get("perception")] == [
        "region_token_start",
        "x_1",
        "y_1",
        "x_1",
        "y_1",
        "region_token_end",
    ]
    (region,), (crop,), (first,) = (events(messages, name) for name in ("region", "crop", "first"))
    assert region["boxes"] == [[0, 0, 111, 111]] and region["cells"] == [[37.25, 37.25, 74.5, 74.5]]
    engine = answerer().engine
    whole, seen = (fed(torch.from_numpy(scene.pixels), box, engine.policy) for box in (None, (0, 0, 111, 111)))
    assert (pixels(first["image"]) == whole.pixels).all() and (pixels(crop["image"]) == seen.pixels).all()
    assert (crop["patch"], crop["merge"], crop["visual_tokens"]) == (14, 2, 16)
    turn = messages[-1]["turn"]
    assert turn["answer"]["text"] == turn["truth"] == "RN" and turn["right"] is True
    assert "".join(m["text"] for m in events(messages, "token") if m["round"] == 2) == "RN"
    assert 0 < turn["second_look_ms"] < turn["milliseconds"]


def test_stages_grow_and_end_as_the_answer_has_them(visitor: Visitor) -> None:
    messages = visitor.ask(TAG, visitor.example())
    told = [message["stages"] for message in messages if "stages" in message]
    assert [len(stages) for stages in told] == sorted(len(stages) for stages in told)
    final = messages[-1]["turn"]["answer"]["stages"]
    assert told[0] == final[: len(told[0])]
    assert [s["stage"] for s in final] == [
        "crop+embed",
        "ViT",
        "prefill",
        "decode",
        "crop+embed",
        "ViT",
        "append",
        "decode",
    ]


def test_a_re_encoding_comes_with_its_map(visitor: Visitor) -> None:
    messages = visitor.ask(COUNT, visitor.example())
    (map_,) = events(messages, "map")
    values = np.array(map_["values"])
    assert values.shape == (4, 4) and (values.min(), values.max()) == pytest.approx(
        (map_["low"], map_["high"]), abs=1e-3
    )
    assert pixels(map_["map"]).shape == (4, 4, 4) and pixels(map_["image"]).shape == (112, 112, 3)
    turn = messages[-1]["turn"]
    assert turn["answer"]["text"] == "1" and turn["answer"]["conditioning"][0] == pytest.approx(
        values.ravel(), abs=2e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_examples_bring_questions_and_their_truth(visitor: Visitor, kind: str) -> None:
    for seed in (0, 1, 1003, 77_777, 1_000_000):
        picture = visitor.example(seed)
        asked = next(q for q in picture["scene"]["questions"] if q["kind"] == kind)
        expected = make_question(make_scene(seed, "test"), kind, seed)
        assert (asked["text"], asked["answer"], asked["look"]) == (expected.text, expected.answer, expected.look)
        assert visitor.turn(asked["text"], picture)["truth"] == expected.answer


def test_looks_are_forced(visitor: Visitor) -> None:
    picture = visitor.example()
    turn = visitor.turn("Which?", picture, looks=["region:x0,y6,x2,y7+x4,y4,x4,y4"])
    assert turn["answer"]["looks"][0]["boxes"] == [[0, 186, 149, 298], [111, 111, 223, 223]]
    assert turn["forced_looks"] == ["region:x0,y6,x2,y7+x4,y4,x4,y4"]
    assert visitor.turn(TAG, picture, looks=["clip"])["answer"]["looks"][0]["kind"] == "clip"


def test_a_wrong_look_is_an_error_message(visitor: Visitor) -> None:
    (started, *_, error) = visitor.ask(TAG, visitor.example(), looks=["region:x9,y0,x9,y0"])
    assert error["event"] == "error" and "x9,y0,x9,y0" in error["message"]


def test_a_conversation_is_the_engines_chat(visitor: Visitor) -> None:
    first, second = visitor.example(SEED), visitor.example(5)
    asked = [(TAG, first), ("What colour is the circle?", first), (COUNT, second), (TAG, first)]
    told = [visitor.turn(question, picture, remember=True) for question, picture in asked]
    assert [turn["remembered"] for turn in told] == [0, 1, 2, 3]
    scenes = {3: make_scene(3, "test").pixels, 5: make_scene(5, "test").pixels}
    with answerer().engine.chat() as chat:
        expected = [
            chat.ask(question, image)
            for question, image in zip((q for q, _ in asked), (scenes[3], 0, scenes[5], 0), strict=True)
        ]
    assert [turn["answer"]["ids"] for turn in told] == [answer.ids for answer in expected]


def test_each_question_by_itself_knows_nothing_of_the_others(visitor: Visitor) -> None:
    picture = visitor.example()
    told = [visitor.turn(TAG, picture) for _ in range(3)]
    assert [turn["remembered"] for turn in told] == [0, 0, 0]
    assert [turn["answer"]["text"] for turn in told] == ["RN"] * 3


def test_undo_and_fork(visitor: Visitor) -> None:
    picture = visitor.example()
    one = visitor.turn(TAG, picture, remember=True)
    two = visitor.turn(COUNT, picture, remember=True)
    fork = visitor.client.post("/api/branches/1/fork").json()["branch"]
    left = visitor.client.post("/api/branches/1/undo").json()["turns"]
    assert left == [one["id"]] and fork == 2
    again = visitor.turn(COUNT, picture, remember=True)
    assert again["answer"]["ids"] == two["answer"]["ids"] and again["remembered"] == 1
    assert visitor.turn(COUNT, picture, remember=True, branch=2)["remembered"] == 2
    kept = [visitor.client.get(f"/api/branches/{n}/answers.json").json()["turns"] for n in (1, 2)]
    assert [len(turns) for turns in kept] == [2, 3] and kept[1][1]["id"] == two["id"]
    assert visitor.client.delete("/api/branches/1").json() == {"branches": [2]}
    assert visitor.client.post("/api/branches/1/undo").status_code == 404
    for _ in range(3):
        assert visitor.client.post("/api/branches/2/undo").status_code == 200
    assert "nothing to undo" in visitor.client.post("/api/branches/2/undo").json()["error"]
    assert visitor.turn(TAG, picture, remember=True, branch=2)["answer"]["ids"] == one["answer"]["ids"]


def test_answers_are_kept_as_json_and_as_a_picture(visitor: Visitor) -> None:
    turn = visitor.turn(TAG, visitor.example())
    kept = visitor.client.get("/api/branches/1/answers.json").json()
    assert kept["model"] == "vpt-mini" and kept["turns"] == [turn]
    assert kept["turns"][0]["answer"]["looks"][0]["boxes"] == [[0, 0, 111, 111]]
    drawn = visitor.client.get(f"/api/turns/{turn['id']}/picture.png")
    image = Image.open(BytesIO(drawn.content))
    assert drawn.headers["content-type"] == "image/png" and min(image.size) > 600


def test_the_same_question_in_three_ways(visitor: Visitor) -> None:
    turn = visitor.turn(TAG, visitor.example())
    messages = list(visitor.stream(f"/api/turns/{turn['id']}/compare"))
    ways = {message["way"]: message for message in events(messages, "compared")}
    assert list(ways) == ["second look", "one look", "published"]
    assert ways["second look"]["text"] == ways["published"]["text"] == "RN" != ways["one look"]["text"]
    assert ways["second look"]["right"] and ways["published"]["right"] and not ways["one look"]["right"]
    assert ways["one look"]["second_look_ms"] is None and ways["published"]["second_look_ms"] > 0
    for way in ways.values():
        assert 0 < sum(stage["milliseconds"] for stage in way["stages"]) <= way["milliseconds"]


def test_stop_ends_the_answer_within_one_token(visitor: Visitor) -> None:
    picture = visitor.example()
    visitor.turn(TAG, picture, remember=True)
    with paced(answerer()) as pace:
        messages = visitor.stream("/api/turns", visitor.asked(COUNT, picture, remember=True))
        started = next(messages)
        pace.waits.wait(60)
        pace.allow(1)
        while next(messages)["event"] != "token":
            pass
        until(pace.waits.is_set)
        steps = pace.steps
        assert visitor.client.post("/api/stop").json() == {"stopped": True}
        pace.allow(100)
        rest = list(messages)
        assert rest[-1]["event"] == "stopped" and rest[-1]["why"] == "cancelled"
        assert pace.steps <= steps + 1
    assert visitor.client.post("/api/stop").json() == {"stopped": False}
    assert len(visitor.client.get("/api/branches/1/answers.json").json()["turns"]) == 1
    again = visitor.ask(COUNT, picture, remember=True)
    assert again[0]["tokens"] == started["tokens"] and again[-1]["turn"]["remembered"] == 1


def test_stop_ends_the_published_procedure_too(visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = visitor.turn(TAG, visitor.example())
    forwards, published = [], answerer().published
    forward = type(published).__mro__[1].forward

    def counted(self, *inputs, **options):
        forwards.append(1)
        if len(forwards) == 3:
            visitor.client.post("/api/stop")
        return forward(self, *inputs, **options)

    monkeypatch.setattr(type(published).__mro__[1], "forward", counted)
    messages = list(visitor.stream(f"/api/turns/{turn['id']}/compare"))
    assert messages[-1]["event"] == "stopped" and len(forwards) == 3


def test_who_stops_reading_stops_the_answer(visitor: Visitor) -> None:
    picture = visitor.example()
    with paced(answerer()) as pace:
        messages = visitor.stream("/api/turns", visitor.asked(TAG, picture))
        assert next(messages)["event"] == "started"
        until(pace.waits.is_set)
        messages.close()
        threading.Event().wait(1)
        pace.allow(100)
        other = Visitor(str(visitor.client.base_url))
        assert other.ask(TAG, other.example())[-1]["event"] == "done"
        # The abandoned answer got no further than the step that it was in; the other one takes ten.
        assert pace.steps < 15
    assert visitor.client.get("/api/branches/1/answers.json").json()["turns"] == []


def test_an_answer_that_takes_too_long_is_stopped() -> None:
    with served(Limits(seconds=0.5)) as (_, address):
        visitor = Visitor(address)
        picture = visitor.example()
        with paced(answerer()) as pace:
            messages = visitor.stream("/api/turns", visitor.asked(TAG, picture))
            next(messages)
            threading.Event().wait(0.6)
            pace.allow(100)
            last = list(messages)[-1]
        assert (last["event"], last["why"], last["seconds"]) == ("stopped", "time", 0.5)
        assert visitor.turn(TAG, picture)["right"]


def test_people_wait_in_line_and_see_their_place(address: str) -> None:
    people = [Visitor(address) for _ in range(3)]
    pictures = [person.example() for person in people]
    with paced(answerer()) as pace:
        streams = [p.stream("/api/turns", p.asked(TAG, q)) for p, q in zip(people, pictures, strict=True)]
        first = [next(stream) for stream in streams]
        assert [m["event"] for m in first] == ["started", "queued", "queued"]
        assert [m.get("ahead") for m in first] == [None, 1, 2]
        assert "under way" in people[0].client.post("/api/branches/1/undo").json()["error"]
        assert people[1].client.post("/api/stop").json()["stopped"]
        assert [m["event"] for m in streams[1]] == ["stopped"]
        assert next(streams[2]) == {"event": "queued", "ahead": 1}
        pace.allow(1000)
        assert list(streams[0])[-1]["turn"]["right"] and list(streams[2])[-1]["turn"]["right"]
        assert pace.steps == 20  # two answers of ten steps: the one that was stopped never began


def test_a_full_line_takes_no_further_question() -> None:
    with served(Limits(waiting=1, sessions=3)) as (_, address):
        people = [Visitor(address) for _ in range(3)]
        pictures = [person.example() for person in people]
        with paced(answerer()) as pace:
            streams = [p.stream("/api/turns", p.asked(TAG, q)) for p, q in zip(people[:2], pictures, strict=False)]
            assert [next(stream)["event"] for stream in streams] == ["started", "queued"]
            refused = people[2].client.post("/api/turns", json=people[2].asked(TAG, pictures[2]))
            assert refused.status_code == 503 and "wait already" in refused.json()["error"]
            again = people[0].client.post("/api/turns", json=people[0].asked(TAG, pictures[0]))
            assert again.status_code == 409
            pace.allow(1000)
            assert all(list(stream)[-1]["event"] == "done" for stream in streams)
        with pytest.raises(KeyError):
            Visitor(address)  # a fourth one is not let in
        people[0].client.delete("/api/session")
        assert Visitor(address).example()["id"]


def test_a_failure_is_told_and_the_next_answer_comes(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    picture = visitor.example()
    with monkeypatch.context() as broken:
        broken.setattr(answerer().watched.executor, "run", lambda requests: 1 / 0)
        assert visitor.ask(TAG, picture)[-1]["event"] == "error"
    assert "ZeroDivisionError" in caplog.text
    assert visitor.turn(TAG, picture)["right"]


def test_a_question_without_a_picture(visitor: Visitor) -> None:
    turn = visitor.turn("Hello?")
    assert turn["picture"] is None and "truth" not in turn
    assert visitor.client.post(f"/api/turns/{turn['id']}/compare").status_code == 422
    assert visitor.client.get(f"/api/turns/{turn['id']}/picture.png").status_code == 422


@pytest.mark.parametrize(
    "body, status, message",
    [
        ({"question": " "}, 422, "empty"),
        ({"question": "x" * 3000}, 422, "3000 characters"),
        ({"question": 5}, 422, "empty"),
        ({"question": "?", "tokens": 0}, 422, "1 to 256"),
        ({"question": "?", "tokens": "many"}, 422, "1 to 256"),
        ({"question": "?", "looks": "clip"}, 422, "list of texts"),
        ({"question": "?", "picture": "nowhere"}, 404, "not here"),
        ({"question": "?", "branch": 7}, 404, "no conversation 7"),
        ({"question": "?", "branch": [1]}, 422, "number"),
        ([1], 422, "JSON object"),
    ],
)
def test_bad_questions_are_refused(visitor: Visitor, body: object, status: int, message: str) -> None:
    response = visitor.client.post("/api/turns", json=body)
    assert response.status_code == status and message in response.json()["error"]


def test_what_the_page_is_told_about_itself(visitor: Visitor) -> None:
    about = visitor.client.get("/api/about").json()
    assert about["name"] == "vpt-mini" and about["reencoder"] == "clip" and about["mini"] and about["grid"] == 8
    assert set(about["stages"]) >= {"prefill", "append"}


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_precision_of_the_weights_is_the_callers(weights: str) -> None:
    """And the published procedure computes with the same numbers."""
    ours, stored = make_answerer(MINI, torch.device("cpu"), weights), answerer()
    assert ours.engine.model.language.layers[0].qkv_weight.dtype == getattr(torch, weights)
    _, state = ours._state()
    _, before = stored._state()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert "lm_head.weight" in changed and all(
        torch.allclose(state[name], before[name], atol=0.02 * float(before[name].abs().max())) for name in changed
    )
    scene = make_scene(SEED, "test")
    image = Image.fromarray(scene.pixels)
    theirs = ours.published.ask(image, TAG, max_new_tokens=64)
    assert list(ours.engine.ask(image, TAG, max_new_tokens=64).ids) == list(theirs.ids)
