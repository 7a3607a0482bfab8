"""Settings of an engine under which the looks must be the same; each is an engine of its own."""

from __future__ import annotations

import pytest

from tests.serving.engines import generate, our_engine, reference, scene_cases, vllm_engine, warm
from vpt_model import mini

pytestmark = pytest.mark.unpoisoned
SETTINGS = {
    "chunks of a prompt": {"max_num_batched_tokens": 48, "max_num_seqs": 4},
    "chunks of 300 tokens": {"max_num_batched_tokens": 300},
    "few blocks": {"num_gpu_blocks_override": 12, "max_model_len": 320},
    "no prefix cache": {"enable_prefix_caching": False},
}


def tokens_under(options, ask):
    """The tokens of every answer; the engine is gone when this returns, so that the next one can begin."""
    engine, cases = our_engine(mini.FOLDER), scene_cases(3)
    with vllm_engine(mini.FOLDER, **options) as llm:
        return [list(output.outputs[0].token_ids) for output in ask(llm, engine, cases)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_look_is_the_same(setting):
    engine = our_engine(mini.FOLDER)
    expected = [reference(engine, case)[0] for case in scene_cases(3)]
    assert tokens_under(SETTINGS[setting], generate) == expected


def test_a_seed_is_the_same_where_requests_are_preempted():
    assert tokens_under(SETTINGS["few blocks"], warm) == tokens_under({}, warm)
