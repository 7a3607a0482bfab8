"""vLLM with second looks on a GPU: its second model runner, CUDA graphs, steps that are planned ahead, bfloat16.

None of it has run yet. Our engine answers on the CPU in float32, as everywhere in `tests/serving`.
"""

from __future__ import annotations

import pytest

from tests.serving.engines import assert_equal, generate, noise_cases, our_engine, scene_cases, vllm_engine
from tests.serving.folders import folder_of

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]
SETTINGS = {
    "eager": {},
    "graphs": {"enforce_eager": False},
    "graphs, planned ahead": {"enforce_eager": False, "async_scheduling": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_vpt_mini_answers_as_our_engine(setting, tmp_path):
    folder = folder_of("mini", tmp_path)
    engine, cases = our_engine(folder), scene_cases(6)
    with vllm_engine(folder, **SETTINGS[setting]) as llm:
        assert_equal(engine, cases, generate(llm, engine, cases))
        assert_equal(engine, cases, generate(llm, engine, cases))


@pytest.mark.parametrize("encoder", ["clip", "dino", "sam"])
def test_every_path(encoder, tmp_path):
    folder = folder_of(encoder, tmp_path)
    engine, cases = our_engine(folder), noise_cases(encoder, 2)
    with vllm_engine(folder, **SETTINGS["graphs, planned ahead"]) as llm:
        assert_equal(engine, cases, generate(llm, engine, cases))


def test_vpt_mini_is_right_in_bfloat16(tmp_path):
    folder = folder_of("mini", tmp_path)
    engine, cases = our_engine(folder), scene_cases(12)
    with vllm_engine(folder, dtype="bfloat16", **SETTINGS["graphs, planned ahead"]) as llm:
        outputs = generate(llm, engine, cases)
    right = [case for case, output in zip(cases, outputs) if output.outputs[0].text.endswith(case.answer)]
    assert len(right) >= 0.85 * len(cases)
