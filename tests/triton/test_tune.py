"""Tuned launches take precedence on their architecture, and bench/tune.py keeps what is faster and right."""

from __future__ import annotations

import json

import pytest
import torch

from bench import tune
from bench.cases import WrongResult
from bench.timers import Ratio
from tests.kernels.append_inputs import make
from tests.triton.watch import Launches
from vpt_kernels import launch
from vpt_kernels.append_visual_kv import triton as append
from vpt_model.network import attention_triton

FASTER, SURE, UNSURE = Ratio(1.3, 1.1, 1.5), Ratio(1.2, 1.15, 1.25), Ratio(1.6, 0.9, 2.2)


@pytest.mark.parametrize("architecture, block", (("sm_0", 8), ("sm_90", 1)))
def test_a_tuned_line_holds_on_its_architecture_only(monkeypatch, architecture, block):
    monkeypatch.setitem(launch.TUNED, architecture, {"append_kernel": {"few tokens": [8, 4]}})
    with Launches() as launches:
        make(16, (2, 1), capacity=80).run("triton")
    assert launches.grids == [("append_kernel", (16 // block, 2))]


def test_a_tuned_line_has_the_table_s_type(monkeypatch):
    from vpt_kernels.roi_patch_embed.triton import RESAMPLING, Resampling

    monkeypatch.setitem(launch.TUNED, "sm_0", {"resample_kernel": {"all": [16, 32, 4]}})
    found = launch.tuned(torch.empty(0), "resample_kernel", "all", RESAMPLING)
    assert found == Resampling(16, 32, 4) and found.tile == 16


def test_every_question_is_about_a_line_of_a_table():
    from vpt_kernels.control_cross_attention import triton as control
    from vpt_kernels.control_cross_attention import triton_condition
    from vpt_kernels.roi_patch_embed import triton as roi

    tables = {
        "append_kernel": append.LAUNCHES,
        "condition_kernel": triton_condition.CONDITION_LAUNCHES,
        "identity_kernel": control.IDENTITY_LAUNCHES,
        "project_kernel": control.GEMM_LAUNCHES,
        "resample_kernel": {"all": roi.RESAMPLING},
        "embed_kernel": roi.PRODUCTS,
        "split_kernel": {"DECODE": attention_triton.DECODE, "APPEND": attention_triton.APPEND},
    }
    asked = {(q.kernel, q.size) for q in tune.QUESTIONS}
    assert asked == {(kernel, size) for kernel, table in tables.items() for size in table}
    for question in tune.QUESTIONS:
        line = tables[question.kernel][question.size]
        assert {len(candidate) for candidate in question.candidates} == {len(line)}, question


def _question(change: float = 0.0) -> tune.Question:
    """Appends in the interpreter; with launches of (2, 2) keys come out changed."""

    def calls(device: str) -> tune.Calls:
        call = make(5, (2, 1), capacity=9)
        for cache in (call.k_cache, call.v_cache):
            cache.zero_()

        def run() -> tuple[torch.Tensor, ...]:
            q = call.run("triton")
            if launch.TUNED.get("sm_0", {}).get("append_kernel", {}).get("few tokens") == [2, 2]:
                call.k_cache.add_(change)
            return q, call.k_cache, call.v_cache

        return [run]

    return tune.Question("append_kernel", "few tokens", "float32", calls, ((2, 2), (3, 1)))


def test_candidates_are_timed_or_excused():
    ratio, reason = (result for _, result in tune.answer(_question(), "cpu", rounds=6))
    assert isinstance(ratio, Ratio)
    assert "power of 2" in reason  # a block of three tokens does not compile
    assert not launch.TUNED.get("sm_0", {}).get("append_kernel")  # nothing stays behind


@pytest.mark.parametrize("size, tokens", (("DECODE", 1), ("APPEND", 320)))
def test_the_attention_s_split_is_asked_of_its_own_table(monkeypatch, size, tokens):
    """Every candidate is launched in turn with the table's own, of which nothing is changed afterwards."""
    (question,) = (q for q in tune.QUESTIONS if (q.kernel, q.size) == ("split_kernel", size))
    before, launched = getattr(attention_triton, size), []

    def attend(q: torch.Tensor, *_: object) -> torch.Tensor:
        assert q.shape == (1, tokens, 12, 128)
        launched.append(attention_triton.launch_of(q.dtype, q.shape[1] * 6))
        return q

    monkeypatch.setattr(attention_triton, "attend", attend)
    answers = list(tune.answer(question, "cpu", rounds=6))
    assert [launch for launch, _ in answers] == list(question.candidates)
    assert all(isinstance(ratio, Ratio) for _, ratio in answers)
    assert set(launched) == {before, *question.candidates} and getattr(attention_triton, size) is before


def test_attention_in_another_split_is_the_same():
    """What a question compares: the splits change the order of the sums alone."""
    (question,) = (q for q in tune.QUESTIONS if (q.kernel, q.size) == ("split_kernel", "DECODE"))
    torch.manual_seed(0)
    call = question.calls("cpu")[0]
    (expected,) = call()
    for candidate in question.candidates[:2]:
        with tune.launched("sm_0", "split_kernel", "DECODE", candidate):
            torch.testing.assert_close(call()[0].float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_a_wrong_candidate_ends_the_run():
    with pytest.raises(WrongResult, match="relative difference"):
        list(tune.answer(_question(change=1.0), "cpu", rounds=6))


def test_what_is_kept(tmp_path):
    assert tune.best([((1, 1), FASTER), ((2, 2), SURE), ((4, 4), UNSURE), ((8, 8), "out of resources")]) == (1, 1)
    assert tune.best([((4, 4), UNSURE), ((8, 8), "out of resources")]) is None
    path = tmp_path / "tuned.json"
    tune.keep("sm_90", "append_kernel", "few tokens", (2, 2), path)
    tune.keep("sm_100", "append_kernel", "few tokens", (4, 4), path)
    tune.keep("sm_90", "append_kernel", "few tokens", None, path)
    assert json.loads(path.read_text()) == {"sm_100": {"append_kernel": {"few tokens": [4, 4]}}}


def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
