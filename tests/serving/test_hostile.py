"""What nobody should send: it is refused or answered, and whoever asks next is told what our engine says."""

from __future__ import annotations

import asyncio
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from bench.vllm_server import picture_url, user
from tests.serving.clients import ask, metric, openai
from tests.serving.engines import Case, reference, scene_cases
from vpt_model import mini
from vpt_model.checkpoint import Checkpoint

pytestmark = pytest.mark.unpoisoned
CASES = scene_cases(1)
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
IDS = Checkpoint.open(mini.FOLDER).tokenizer().ids
CLIP, MANY = {"vpt_looks": "clip"}, {"vpt_max_looks": 8}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> str:
    """A picture as clients send it, in any form."""
    import base64

    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def shown(address: str, text: str = CASES[0].text) -> list[dict]:
    """Messages with a picture at an address."""
    picture = {"type": "image_url", "image_url": {"url": address}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


WHOLE = picture_url(CASES[0].pixels)
PICTURE = Image.fromarray(CASES[0].pixels)


def chat(messages: list[dict] | None = None, **options: object) -> dict:
    return {"messages": messages or shown(WHOLE), "temperature": 0, "max_tokens": 24} | options


def looking(messages: list[dict] | None = None, xargs: object = None, **options: object) -> dict:
    return chat(messages, vllm_xargs=CLIP if xargs is None else xargs, **options)


def responding(**options: object) -> dict:
    content = [{"type": "input_image", "image_url": WHOLE, "detail": "auto"}, {"type": "input_text", "text": "What?"}]
    return {"input": [{"role": "user", "content": content}], "temperature": 0, "max_output_tokens": 24} | options


def completing(prompt: object, **options: object) -> dict:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 8} | options


def continued(said: str) -> dict:
    """A turn that the client has begun."""
    messages = [*shown(WHOLE), {"role": "assistant", "content": said}]
    return chat(messages, add_generation_prompt=False, continue_final_message=True)


BODY = json.dumps(chat())[:-1]
REFUSED = {
    "options that are no object": (CHAT, chat(vllm_xargs="clip")),
    "looks: null": (CHAT, looking(xargs={"vpt_looks": None})),
    "looks: nested": (CHAT, looking(xargs={"vpt_looks": [["clip"]]})),
    "looks: of two types": (CHAT, looking(xargs={"vpt_looks": ["clip", 1]})),
    "looks: a line behind it": (CHAT, looking(xargs={"vpt_looks": "region:x1,y1,x3,y3\n"})),
    "looks: in capitals": (CHAT, looking(xargs={"vpt_looks": "CLIP"})),
    "looks: a negative cell": (CHAT, looking(xargs={"vpt_looks": "region:x-1,y1,x3,y3"})),
    "looks: digits of another script": (CHAT, looking(xargs={"vpt_looks": "region:x２,y1,x3,y3"})),
    "looks: a megabyte": (CHAT, looking(xargs={"vpt_looks": "region:" + "x1,y1,x2,y2+" * 90_000})),
    "looks: half a character": (CHAT, looking(xargs={"vpt_looks": "\ud800"})),
    "most looks: beyond 64 bits": (CHAT, looking(xargs={"vpt_max_looks": 10**30})),
    "most looks: NaN": (CHAT, BODY + ', "vllm_xargs": {"vpt_max_looks": NaN}}'),
    "most looks: infinite": (CHAT, BODY + ', "vllm_xargs": {"vpt_max_looks": 1e400}}'),
    "an option twice, the second bad": (CHAT, BODY + ', "vllm_xargs": {"vpt_max_looks": 1, "vpt_max_looks": 77}}'),
    "options twice, the second bad": (CHAT, BODY + ', "vllm_xargs": {}, "vllm_xargs": {"vpt_looks": "sam"}}'),
    "a transfer of keys that is a word": (CHAT, looking(xargs={"kv_transfer_params": "x"})),
    "half of a body": (CHAT, BODY),
    "a picture: no base64": (CHAT, chat(shown("data:image/png;base64,!!!!"))),
    "a picture: empty": (CHAT, chat(shown("data:image/png;base64,"))),
    "a picture: cut off": (CHAT, chat(shown(WHOLE[: len(WHOLE) // 2]))),
    "a picture: 100 megapixels": (CHAT, looking(shown(encoded(Image.new("L", (10_000, 10_000)))))),
    "a picture: no address": (CHAT, chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])),
    "more pictures than fit": (CHAT, chat([user("What?", *[CASES[0].pixels] * 60)])),
    "no message": (CHAT, {"messages": [], "max_tokens": 4}),
    "no content": (CHAT, chat([{"role": "user", "content": None}])),
    "a look without a picture": (COMPLETIONS, completing("hello", vllm_xargs=CLIP)),
    "a tool": (CHAT, chat(tools=[FUNCTION], tool_choice="required")),
    "no answers": (CHAT, chat(n=0)),
    "a billion answers": (CHAT, chat(n=10**9, temperature=1.0)),
    "no tokens": (CHAT, looking(max_tokens=0)),
    "more tokens than fit": (CHAT, looking(max_tokens=2**70)),
    "at least more than at most": (CHAT, looking(min_tokens=50)),
    "an empty stop": (CHAT, chat(stop=[""])),
    "a bias outside the vocabulary": (CHAT, looking(logit_bias={"99999": 1})),
    "allowed: nothing": (CHAT, looking(allowed_token_ids=[])),
    "more log-probabilities than there are": (CHAT, looking(prompt_logprobs=10**6)),
    "a temperature that is no number": (CHAT, BODY.replace('"temperature": 0', '"temperature": NaN') + "}"),
    "a grammar and a look": (CHAT, looking(structured_outputs={"choice": ["yes", "no"]})),
    "an object and a look": (CHAT, looking(response_format={"type": "json_object"})),
    "a grammar that is none": (CHAT, chat(structured_outputs={"regex": "("})),
    "a response: a look of another model": (RESPONSES, responding(vllm_xargs={"vpt_looks": "sam"})),
    "a response: a broken picture": (
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]}]},
    ),
    "ids: outside the vocabulary": (COMPLETIONS, completing([99999])),
    "ids: negative": (COMPLETIONS, completing([-1])),
    "ids: none": (COMPLETIONS, completing([[]])),
}
UNKNOWN = {
    "another model": (CHAT, chat(model="no-such-adapter")),
    "a response that never was": (RESPONSES, responding(previous_response_id="resp_none")),
    "embeddings": ("/v1/embeddings", {"input": "x"}),
    "pooling": ("/pooling", {"input": "x"}),
}
ANSWERED = {
    "looks: none": (CHAT, looking(xargs={"vpt_looks": []})),
    "looks: a box from the right to the left": (CHAT, looking(xargs={"vpt_looks": "region:x5,y5,x2,y2"})),
    "ten thousand options of others": (CHAT, looking(xargs={f"other{i}": i for i in range(10_000)})),
    "a picture: 16 bits": (CHAT, looking(shown(encoded(Image.fromarray(np.arange(4096).astype(np.uint16) * 15))))),
    "a picture: animated": (CHAT, looking(shown(encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE])))),
    "a picture: of ink": (CHAT, looking(shown(encoded(PICTURE.convert("CMYK"), "JPEG")))),
    "a picture: one pixel": (CHAT, looking(shown(encoded(Image.new("RGB", (1, 1)))))),
    "a picture: a line": (CHAT, looking(shown(encoded(Image.new("RGB", (1, 10_000)))), xargs=MANY)),
    "ten pictures": (CHAT, looking([user("What?", *[CASES[0].pixels] * 10)])),
    "no question": (CHAT, looking(shown(WHOLE, ""))),
    "no user": (CHAT, chat([{"role": "system", "content": "Be brief."}])),
    "a picture of the system's": (CHAT, looking([{**shown(WHOLE)[0], "role": "system"}, user("What?")])),
    "pads without a picture": (CHAT, chat([user("<|vision_start|><|image_pad|><|vision_end|> What?")])),
    "pads behind a picture": (CHAT, looking(shown(WHOLE, "<|image_pad|><|clip_image_pad|><|video_pad|>"))),
    "an action in a question": (CHAT, looking(shown(WHOLE, "<|clip_action_start|><|clip_action|>"))),
    "a turn that has asked": (CHAT, continued("<|clip_action_start|>")),
    "a turn that has begun to ask": (CHAT, continued("<|region_token_start|><|x_1|>")),
    "64 answers": (CHAT, looking(n=64, temperature=1.0)),
    "a stop among the tokens that ask": (CHAT, chat(stop=["<|x_"], skip_special_tokens=False)),
    "a stop at their end": (CHAT, chat(stop_token_ids=[IDS.region_end])),
    "a stop at every token": (CHAT, looking(stop=["<", "a", "e", "i"], n=4, temperature=1.0)),
    "always looking": (CHAT, looking(xargs=MANY, logit_bias={str(IDS.action_start): 100})),
    "always acting": (CHAT, looking(xargs=MANY, logit_bias={str(IDS.action): 100})),
    "nothing else allowed than looking": (CHAT, looking(xargs=MANY, allowed_token_ids=[IDS.action_start])),
    "nothing else allowed than pads": (CHAT, looking(xargs=MANY, allowed_token_ids=[IDS.kind_pad])),
    "log-probabilities of the prompt": (CHAT, looking(prompt_logprobs=2)),
    "beams": (CHAT, looking(use_beam_search=True, n=2)),
    "an object": (CHAT, chat(response_format={"type": "json_object"})),
    "penalties": (CHAT, looking(frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=1.5)),
    "no end": (CHAT, looking(ignore_eos=True, min_tokens=24)),
    "a priority": (CHAT, looking(priority=5)),
    "usage in every event": (
        CHAT,
        looking(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    ),
    "a response that looks": (RESPONSES, responding(vllm_xargs=CLIP, stream=True)),
    "ids that act": (COMPLETIONS, completing([65, IDS.action, IDS.action_start])),
    "ids of pads": (COMPLETIONS, completing([IDS.vision_start, IDS.image_pad, IDS.kind_pad])),
    "echo": (COMPLETIONS, completing("hello", echo=True, logprobs=1)),
    "ids of a picture": ("/tokenize", {"messages": shown(WHOLE)}),
}
EVERY = [
    (status, name, *call)
    for status, calls in ((400, REFUSED), (404, UNKNOWN), (200, ANSWERED))
    for name, call in calls.items()
]


@pytest.fixture(scope="module")
def good(client, engine):
    """Asks what our engine can answer, and says whether it was answered alike."""
    expected = [reference(engine, case)[1].text for case in CASES]

    def asks() -> bool:
        return [ask(client, case).choices[0].message.content for case in CASES] == expected

    return asks


@pytest.mark.parametrize(("status", "name", "path", "body"), EVERY, ids=[name for _, name, *_ in EVERY])
def test_nothing_spoils_the_next_answer(address, good, status, name, path, body):
    text = body if isinstance(body, str) else json.dumps(body)
    told = httpx.post(address + path, content=text, headers={"Content-Type": "application/json"}, timeout=300)
    assert told.status_code == status, told.text[:300]
    assert good()


@pytest.mark.parametrize("looks", [0, 1, 2])
@pytest.mark.parametrize("always", ["action_start", "action"])
def test_no_bias_leads_beyond_the_limit_of_tokens(client, always, looks):
    """Behind the start of an action that may not look, the action is a token of its own."""
    bias = {str(getattr(IDS, always)): 100}
    for limit in range(1, 8):
        told = ask(client, CASES[0], logit_bias=bias, max_completion_tokens=limit, xargs={"vpt_max_looks": looks})
        assert told.usage.completion_tokens == limit and told.choices[0].finish_reason == "length"


def test_clients_that_go_away_at_every_piece_leave_nothing(address, good):
    """In the middle of looks, too: before the token that asks, between it and the image, and behind both."""
    case = Case(CASES[3].pixels, CASES[3].text)

    async def gone(client, pieces, xargs):
        stream = await ask(client, case, stream=True, xargs=xargs)
        async for _ in stream:
            if (pieces := pieces - 1) < 0:
                break
        await stream.close()

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(gone(client, i % 6, CLIP if i % 2 else MANY) for i in range(24)))

    asyncio.run(all_of_them())
    assert good()
    assert sum(metric(address, "vllm:num_requests_running").values()) == 0
    assert sum(metric(address, "vllm:kv_cache_usage_perc").values()) == 0
