"""OpenAI's client of a server of vpt-mini, what it is asked, and what the server then says of itself."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from bench.vllm_server import user
from tests.serving.engines import Case
from vpt_model import mini
from vpt_model.checkpoint import Checkpoint
from vpt_model.engine.events import Answer

openai = import_module("openai")  # behind the module that says whether vLLM is here
REGION_END = Checkpoint.open(mini.FOLDER).tokenizer().ids.region_end


def client_of(address: str) -> Any:
    """A client that asks once."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: Any, case: Case, **options: Any) -> Any:
    """A chat completion, greedy unless told otherwise; an asynchronous client awaits it. xargs: our options."""
    extra = {"vllm_xargs": options.pop("xargs", None) or case.options()}
    options = {"temperature": 0, "max_completion_tokens": 64} | options
    pictures = () if case.pixels is None else (case.pixels,)
    return client.chat.completions.create(
        model=str(mini.FOLDER), messages=[user(case.text, *pictures)], extra_body=extra, **options
    )


def ask_all(address: str, cases: Sequence[Case]) -> list[Any]:
    """What each of as many clients at a time is told."""

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, case) for case in cases))

    return asyncio.run(all_of_them())


def assert_answered(told: Any, answer: Answer) -> None:
    """Text and looks are those of our engine; perception tokens in an answer, and what precedes them, are reasoning."""
    *_, spoken = re.split(r"<\|\w+\|>", answer.text)
    assert (told.choices[0].message.content or "") == spoken
    looks = (told.kv_transfer_params or {}).get("vpt_looks", [])
    seen = [(look.kind, [list(box) for box in look.boxes], look.tokens, look.appended) for look in answer.looks]
    found = [(x["kind"], x["boxes"], x["tokens"], x["appended"] + _otherwise_fed(x)) for x in looks]
    assert found == seen
    assert all(len(look["ids"]) == look["appended"] for look in looks)


def _otherwise_fed(look: dict[str, Any]) -> int:
    """Tokens that our engine counts with a look's chunk and the server does not.

    An action start is fed with the chunk there, and in a step of its own here; a forced region is said before the chunk
    there, and with it here.
    """
    if look["kind"] != "region":
        return 1
    ids = look["ids"]
    return ids[::-1].index(REGION_END) - len(ids) if REGION_END in ids else 0


def metric(address: str, name: str) -> dict[str, float]:
    """The values of a metric, by their labels."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)}
