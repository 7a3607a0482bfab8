"""The second look inside vLLM gives the tokens that our engine gives, on the same weights, whatever path it takes."""

from __future__ import annotations

import pytest

from tests.serving.engines import assert_equal, generate, noise_cases, our_engine, scene_cases, vllm_engine
from tests.serving.folders import folder_of

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def test_vpt_mini_looks_by_itself_and_answers_right(root):
    folder = folder_of("mini", root)
    engine, cases = our_engine(folder), scene_cases(3)
    with vllm_engine(folder) as llm:
        outputs = generate(llm, engine, cases)
        assert_equal(engine, cases, outputs)
        right = [case for case, output in zip(cases, outputs) if output.outputs[0].text.endswith(case.answer)]
        assert len(right) >= len(cases) - 1
        # Again, one prompt's blocks now being in the prefix cache.
        again = generate(llm, engine, cases)
        assert sum(output.num_cached_tokens for output in again) > 0
        assert_equal(engine, cases, again)


@pytest.mark.parametrize("name", ["clip", "dino", "sam"])
def test_every_kind_and_path(name, root):
    folder = folder_of(name, root)
    engine, cases = our_engine(folder), noise_cases(name, 3)
    with vllm_engine(folder) as llm:
        assert_equal(engine, cases, generate(llm, engine, cases))
        assert_equal(engine, cases, generate(llm, engine, cases))
