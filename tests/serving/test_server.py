"""One server of vpt-mini and a real OpenAI client; a test for each promise of docs/serving.md."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.vllm_server import picture_url, user
from tests.serving.clients import ask, ask_all, assert_answered, metric, openai
from tests.serving.engines import Case, reference, scene_cases
from vpt_model import mini

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.unpoisoned
CASES = scene_cases(3)


def test_the_client_of_the_page(address, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/serving.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(CASES[0].pixels).save("picture.png")
    exec(code.replace("http://localhost:8000", address), {})  # noqa: S102
    assert capsys.readouterr().out.strip()


def answer_of(engine, case):
    return reference(engine, case)[1]


def test_many_clients_at_a_time(address, engine):
    """Text and looks are our engine's, which are right."""
    right = 0
    for case, told in zip(CASES, ask_all(address, CASES), strict=True):
        answer, choice = answer_of(engine, case), told.choices[0]
        assert_answered(told, answer)
        assert choice.message.content == answer.text and choice.finish_reason == "stop"
        assert bool(choice.message.reasoning) == bool(answer.looks)
        right += choice.message.content == case.answer
    assert right >= len(CASES) - 1


def test_streams_are_the_same_text(client):
    for case in CASES[:4]:
        whole, reasoning, content = ask(client, case).choices[0].message, "", ""
        for part in ask(client, case, stream=True):
            if part.choices:
                reasoning += getattr(part.choices[0].delta, "reasoning", None) or ""
                content += part.choices[0].delta.content or ""
        assert (reasoning, content) == (whole.reasoning or "", whole.content)


@pytest.mark.parametrize("look", ["region:x1,y1,x3,y3", "region:x0,y0,x2,y2+x4,y4,x6,y6", "clip"])
def test_forced_looks(client, engine, look):
    case = Case(CASES[2].pixels, CASES[2].text, [look])
    told = ask(client, case, xargs={"vpt_looks": look})
    assert told.choices[0].message.content == answer_of(engine, case).text
    assert len(told.kv_transfer_params["vpt_looks"]) == 1


def test_no_looks_when_none_are_allowed(client, engine):
    case = Case(CASES[0].pixels, CASES[0].text, max_looks=0)
    told = ask(client, case)
    assert told.kv_transfer_params is None and answer_of(engine, case).finish_reason == "looks"
    assert told.choices[0].message.content is None and told.choices[0].message.reasoning


def test_text_alone(client, engine):
    case = Case(None, "What colour is the square?", max_tokens=8)
    told = ask(client, case, max_completion_tokens=8)
    assert told.choices[0].message.content == answer_of(engine, case).text


def test_a_seed_repeats_itself_among_others(client):
    options = {"temperature": 0.9, "seed": 5, "n": 3}
    first, second = (ask(client, CASES[0], **options) for _ in range(2))
    texts = [
        [(choice.message.reasoning, choice.message.content) for choice in told.choices] for told in (first, second)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 3


@pytest.mark.parametrize("look", [None, "clip", "region:x1,y1,x3,y3"])
def test_n_answers_are_those_of_n_requests(client, look):
    """`n` answers have the seeds that follow the request's; each of them takes its own look."""
    options = {"temperature": 0.9, "logprobs": True} | ({"xargs": {"vpt_looks": look}} if look else {})
    together = ask(client, CASES[0], seed=5, n=3, **options)
    alone = [ask(client, CASES[0], seed=5 + number, **options) for number in range(3)]

    def said(choice):
        return choice.message.reasoning, choice.message.content, [token.token for token in choice.logprobs.content]

    assert [said(choice) for choice in together.choices] == [said(told.choices[0]) for told in alone]
    assert together.usage.completion_tokens == sum(told.usage.completion_tokens for told in alone)


def test_log_probabilities(client):
    told = ask(client, CASES[0], logprobs=True, top_logprobs=1)
    tokens = told.choices[0].logprobs.content
    assert len(tokens) == told.usage.completion_tokens
    assert all(token.logprob <= 0 for token in tokens) and tokens[-1].logprob > -1


def test_a_stop_string_ends_the_answer(client):
    whole = ask(client, CASES[0]).choices[0].message.content
    told = ask(client, CASES[0], stop=[whole[-1]])
    assert (told.choices[0].message.content or "") == whole[: whole.index(whole[-1])]
    assert told.choices[0].finish_reason == "stop"


def test_the_limit_of_tokens_holds_for_all_rounds_together(client):
    for limit in range(1, 9):
        told = ask(client, CASES[0], max_completion_tokens=limit)
        assert told.usage.completion_tokens <= limit
        if told.usage.completion_tokens == limit and told.choices[0].finish_reason != "stop":
            assert told.choices[0].finish_reason == "length"


BAD = [
    {"vpt_looks": "region:nonsense"},
    {"vpt_looks": "region:x1,y1,x8,y3"},
    {"vpt_looks": "region:x1,y1,x3"},
    {"vpt_looks": "region:"},
    {"vpt_looks": "region:x1,y1,x3,y3+"},
    {"vpt_looks": ""},
    {"vpt_looks": "region:" + "+".join(["x0,y0,x1,y1"] * 65)},
    {"vpt_looks": "depth"},
    {"vpt_looks": "sam"},
    {"vpt_looks": ["clip", "dino"], "vpt_max_looks": 2},
    {"vpt_looks": ["clip", "clip"]},
    {"vpt_looks": "clip", "vpt_max_looks": 0},
    {"vpt_looks": 1},
    {"vpt_max_looks": -1},
    {"vpt_max_looks": 99},
    {"vpt_max_looks": 1.5},
    {"vpt_max_looks": "many"},
    {"vpt_look": "clip"},
    {"vpt_control_slot": 0},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_option_is_a_400_and_the_server_lives(client, bad):
    with pytest.raises(openai.BadRequestError, match=next(iter(bad))):
        ask(client, CASES[0], xargs=bad, max_completion_tokens=4)
    assert ask(client, CASES[0], max_completion_tokens=4).choices


SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}},
}


def test_a_schema_takes_no_looks_and_says_so(client):
    told = ask(client, CASES[0], response_format=SCHEMA, max_completion_tokens=200)
    text = (told.choices[0].message.reasoning or "") + (told.choices[0].message.content or "")
    if told.choices[0].finish_reason == "stop":
        assert json.loads(text) == {"a": "x"}
    assert text.lstrip().startswith("{")
    assert "schema" in told.kv_transfer_params["vpt_notices"][0] and "vpt_looks" not in told.kv_transfer_params


def test_a_schema_and_a_forced_look_are_a_400(client):
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        ask(client, CASES[0], response_format=SCHEMA, xargs={"vpt_looks": "clip"})


def test_several_images_and_turns(client):
    first, second = CASES[0], CASES[4]
    said = ask(client, first).choices[0].message.content
    messages = [
        user(first.text, first.pixels),
        {"role": "assistant", "content": said},
        user(second.text, second.pixels),
    ]
    told = client.chat.completions.create(model=str(mini.FOLDER), messages=messages, temperature=0, max_tokens=64)
    height, width, _ = second.pixels.shape
    for look in (told.kv_transfer_params or {}).get("vpt_looks", []):
        assert all(box[2] <= width and box[3] <= height for box in look["boxes"])
    assert told.choices[0].finish_reason in ("stop", "length")


def test_the_responses_interface(client):
    case = CASES[0]
    picture = {"type": "input_image", "image_url": picture_url(case.pixels), "detail": "auto"}
    content = [picture, {"type": "input_text", "text": case.text}]
    told = client.responses.create(
        model=str(mini.FOLDER), input=[{"role": "user", "content": content}], temperature=0, max_output_tokens=64
    )
    assert told.output_text == case.answer


def test_clients_that_go_away_leave_nothing(address, client):
    async def gone(client, case):
        stream = await ask(client, case, stream=True)
        async for part in stream:
            if part.choices and part.choices[0].delta.content:
                break
        await stream.close()

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(gone(client, case) for case in CASES))

    asyncio.run(all_of_them())
    assert ask(client, CASES[1]).choices[0].message.content == CASES[1].answer
    assert sum(metric(address, "vllm:num_requests_running").values()) == 0
    assert sum(metric(address, "vllm:kv_cache_usage_perc").values()) == 0


def test_looks_among_the_metrics(address, client):
    for look in ("clip", "region:x1,y1,x3,y3"):
        ask(client, CASES[0], xargs={"vpt_looks": look})
    counts = metric(address, "vllm:vpt_look_seconds_count")
    assert {kind for kind in ("clip", "region") for labels in counts if f'kind="{kind}"' in labels} == {
        "clip",
        "region",
    }
    assert sum(metric(address, "vllm:vpt_look_seconds_sum").values()) > 0


def test_what_comes_with_an_image_alone_is_a_400_without_one(client):
    """The message says what was asked, what there is, and what to do; in every interface that takes the options."""
    told = r"vpt_looks is .*clip.* 0 images .* needs 1: add an image .* or leave vpt_looks out"
    model, forced = str(mini.FOLDER), {"vllm_xargs": {"vpt_looks": "clip"}}
    text = Case(None, "What colour is it?")
    with pytest.raises(openai.BadRequestError, match=told):
        ask(client, text, xargs=forced["vllm_xargs"])
    with pytest.raises(openai.BadRequestError, match=told):
        ask(client, text, xargs={"vpt_looks": ["clip"]}, n=2, temperature=1.0)
    with pytest.raises(openai.BadRequestError, match=told):
        client.completions.create(model=model, prompt="What colour?", max_tokens=4, extra_body=forced)
    with pytest.raises(openai.BadRequestError, match=told):
        client.responses.create(model=model, input="What colour?", max_output_tokens=4, extra_body=forced)
    assert ask(client, text, max_completion_tokens=4).choices and ask(client, CASES[0]).choices[0].message.content


def test_in_a_stream_what_is_wrong_is_its_only_event(client):
    """Its head with the status has left by then; the picture that came with it can be shown again."""
    for case, xargs in ((CASES[0], {"vpt_looks": "sam"}), (Case(None, "What colour?"), {"vpt_looks": "clip"})):
        with pytest.raises(openai.APIError, match="vpt_looks") as raised:
            list(ask(client, case, xargs=xargs, stream=True))
        assert raised.value.body["code"] == 400
    assert ask(client, CASES[0]).choices[0].message.content


def test_a_region_that_no_crop_can_be_made_of_is_told(client):
    """A picture with fewer rows than the grid."""
    case = Case(np.zeros((2, 300, 3), np.uint8), "What is it?")
    told = ask(client, case, xargs={"vpt_looks": "region:x1,y0,x2,y0"}, max_completion_tokens=4)
    assert told.kv_transfer_params["vpt_notices"][0].startswith("no second look:")
    assert told.choices[0].finish_reason in ("stop", "length")
    assert ask(client, CASES[0]).choices[0].message.content
