"""Settings of an engine under which the looks must be the same; each is an engine of its own."""

from __future__ import annotations

from unittest import mock

import pytest

from tests.serving.engines import (
    assert_equal,
    generate,
    noise_cases,
    our_engine,
    reference,
    scene_cases,
    scheduler_of,
    vllm_engine,
    warm,
)
from tests.serving.folders import folder_of
from vpt_model import mini

pytestmark = pytest.mark.unpoisoned
SETTINGS = {
    "chunks of a prompt": {"max_num_batched_tokens": 48, "max_num_seqs": 4},
    "few blocks": {"num_gpu_blocks_override": 12, "max_model_len": 320},
    "no prefix cache": {"enable_prefix_caching": False},
    "compiled": {"enforce_eager": False},
}


def tokens_under(options, ask):
    """The tokens of every answer; the engine is gone when this returns, so that the next one can begin."""
    engine, cases = our_engine(mini.FOLDER), scene_cases(3)
    with vllm_engine(mini.FOLDER, **options) as llm:
        return [list(output.outputs[0].token_ids) for output in ask(llm, engine, cases)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_look_is_the_same(setting):
    from torch._dynamo.utils import counters

    engine = our_engine(mini.FOLDER)
    expected = [reference(engine, case)[0] for case in scene_cases(3)]
    counters.clear()
    assert tokens_under(SETTINGS[setting], generate) == expected
    # vLLM compiles a few operations of its own in any case.
    assert (counters["stats"]["calls_captured"] > 100) == (setting == "compiled")


@pytest.mark.parametrize("encoder", ["clip", "dino", "sam"])
def test_prompts_and_looks_are_read_in_parts(encoder, tmp_path):
    """No step reads more than 300 tokens, of all requests together."""
    folder, parts = folder_of(encoder, tmp_path), {"prompt": 0, "look": 0}
    engine, cases = our_engine(folder), noise_cases(encoder, 3)
    with vllm_engine(folder, max_num_batched_tokens=300) as llm:
        scheduler = scheduler_of(llm)
        schedule = scheduler.schedule

        def counted(*args, **kwargs):
            output = schedule(*args, **kwargs)
            for each in (r for r in scheduler.running if r.num_computed_tokens < r.num_prompt_tokens):
                parts["look" if scheduler.conversations[each.request_id].looks else "prompt"] += 1
            return output

        with mock.patch.object(scheduler, "schedule", counted):
            assert_equal(engine, cases, generate(llm, engine, cases))
    assert min(parts.values()) > 0


def test_a_seed_is_the_same_where_requests_are_preempted():
    assert tokens_under(SETTINGS["few blocks"], warm) == tokens_under({}, warm)
