"""Every stored form of a checkpoint is served, with the tokens that our engine gives of the same folder."""

from __future__ import annotations

import pytest

from tests.serving.engines import assert_equal, generate, noise_cases, our_engine, vllm_engine
from tests.serving.folders import folder_of

pytestmark = pytest.mark.unpoisoned


@pytest.mark.parametrize("form", ["bin", "vrt", "fused"])
def test_a_stored_form(form, tmp_path):
    folder = folder_of(form, tmp_path)
    engine, cases = our_engine(folder), noise_cases("clip", 1)
    with vllm_engine(folder) as llm:
        assert_equal(engine, cases, generate(llm, engine, cases))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slice-clip", "slice-dino"])
def test_true_widths(name, tmp_path):
    folder = folder_of(name, tmp_path)
    engine, cases = our_engine(folder), noise_cases(name.partition("-")[2], 2)
    with vllm_engine(folder) as llm:
        assert_equal(engine, cases, generate(llm, engine, cases))
