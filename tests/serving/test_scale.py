"""More than one process of each kind: the answers and looks of one server, and every look counted once."""

from __future__ import annotations

import re
import time

import pytest

from bench.vllm_server import served
from tests.serving.clients import ask, ask_all, assert_answered, client_of, metric, openai
from tests.serving.engines import Case, our_engine, reference, scene_cases
from vpt_model import mini

pytestmark = pytest.mark.unpoisoned
FLAGS = {
    # As many API servers by vLLM's default, each of which asks both engines.
    "data parallel": ("--data-parallel-size", "2"),
    "tensor parallel, several API servers": ("--tensor-parallel-size", "2", "--api-server-count", "2"),
}


def cases() -> list[Case]:
    """Questions that the model looks for by itself, and others for which it is made to."""
    free, forced = scene_cases(3), []
    for case in scene_cases(2):
        forced += [Case(case.pixels, case.text, [look]) for look in ("clip", "region:x0,y0,x2,y2+x4,y4,x6,y6")]
    return [*free, *forced]


@pytest.mark.parametrize("flags", FLAGS)
def test_answers_and_looks_are_those_of_one_server(flags, tmp_path):
    engine, asked = our_engine(mini.FOLDER), cases()
    expected = [reference(engine, case)[1] for case in asked]
    with served(mini.FOLDER, tmp_path / "log.txt", "--reasoning-parser", "vpt", *FLAGS[flags]) as (address, _):
        for told, answer in zip(ask_all(address, asked), expected, strict=True):
            assert_answered(told, answer)
        # Statistics of the last steps may reach the other API server.
        until = time.monotonic() + 30
        while any(metric(address, "vllm:num_requests_running").values()) and time.monotonic() < until:
            time.sleep(0.5)
        # Connections are shared out: some of these reach each API server.
        for _ in range(6):
            for case, look, told in ((asked[0], "sam", "re-encodes with"), (Case(None, "What?"), "clip", "0 images")):
                with pytest.raises(openai.BadRequestError, match=told):
                    ask(client_of(address), case, xargs={"vpt_looks": look})
            counts = metric(address, "vllm:vpt_look_seconds_count")
            assert sum(counts.values()) == sum(len(answer.looks) for answer in expected)
            busy = metric(address, "vllm:num_requests_running") | metric(address, "vllm:kv_cache_usage_perc")
            assert busy and not any(busy.values())
    engines = {found[1] for labels in counts if (found := re.search(r'engine="(\d)"', labels))}
    assert engines == ({"0", "1"} if flags == "data parallel" else {"0"})
