"""The shipped launch tables, launches per call, workspace, what is declined, and the operators under torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers import assert_same_bits, each_dtype, normal
from tests.kernels import append_checks
from tests.kernels.append_checks import check as check_append
from tests.kernels.append_inputs import make
from tests.kernels.control_checks import check as check_control
from tests.kernels.control_inputs import composition, fold, parameters
from tests.kernels.operator_calls import (
    FUNCTIONS,
    append_cases,
    compare_compiled,
    control_cases,
    overload,
)
from tests.triton.watch import Allocations, Launches, outputs
from vpt_kernels import BackendUnavailable, control_cross_attention, explain, fold_projector
from vpt_kernels.append_visual_kv import triton as append
from vpt_kernels.control_cross_attention import api as control_api
from vpt_kernels.control_cross_attention import triton as control


@each_dtype
@pytest.mark.parametrize("size", append.LAUNCHES)
def test_append_tables(monkeypatch, dtype, size):
    """Each line of the table, on more than one block of tokens and of heads, none of them full."""
    monkeypatch.setattr(append, "LAUNCHES", dict.fromkeys(append.LAUNCHES, append.LAUNCHES[size]))
    check_append(make(11, (5, 5), 24, rotary_dim=16, dtype=dtype, capacity=20), "triton")


@pytest.mark.parametrize("tokens", (1, 64, 65))
def test_append_of_a_size_uses_its_line(tokens):
    call = make(tokens, (2, 1), capacity=80)
    with Launches() as launches:
        call.run("triton")
    block, _ = append.LAUNCHES["few tokens" if tokens <= 64 else "some tokens"]
    assert launches.grids == [("append_kernel", (-(-tokens // block), 2))]


@each_dtype
@pytest.mark.parametrize("size", control.GEMM_LAUNCHES)
@pytest.mark.parametrize("form", ("linear", "conv"))
def test_gemm_tables(monkeypatch, dtype, size, form):
    """The blocks of each line, two along every axis with the last one partly empty."""
    block_m, block_n, block_k, *rest = control.GEMM_LAUNCHES[size]
    monkeypatch.setattr(control, "GEMM_LAUNCHES", dict.fromkeys(control.GEMM_LAUNCHES, control.GEMM_LAUNCHES[size]))
    if form == "linear":
        check_control("linear", block_n + 3, (block_m + 5, block_k + 9), [3, block_m + 2], dtype, "triton", rounds=2)
    else:
        check_control("conv", 24, (2, 5, 4, 8), None, dtype, "triton", rounds=4)


@each_dtype
@pytest.mark.parametrize("images, rounds", ((1, 8), (5, 3)))
def test_condition_tables(dtype, images, rounds):
    check_control("identity", 70, (images, 9, 70), None, dtype, "triton", rounds=rounds)


def test_append_is_one_launch_and_allocates_q():
    for float8, norm in ((False, None), (True, None), (False, torch.ones(16)), (True, torch.ones(16))):
        call = make(7)
        if float8:
            caches = {n: torch.zeros(40, 2, 16).to(torch.float8_e4m3fn) for n in ("k_cache", "v_cache")}
            call = replace(call, **caches, k_scale=torch.ones(2), v_scale=torch.tensor(0.5))
        options = (*call.sections, False, False, call.k_scale, call.v_scale, norm, norm, 1e-6)
        with Launches() as launches:
            with Allocations() as fresh:
                append.append_visual_kv(*call.tensors(), *options)
            with Allocations() as in_place:
                append.append_visual_kv_(*call.tensors(), *options)
        assert [name for name, _ in launches.grids] == ["append_kernel"] * 2
        assert outputs(fresh) == [call.q.numel() * 4] and outputs(in_place) == []


@pytest.mark.parametrize("form", ("linear", "conv", "identity"))
@pytest.mark.parametrize("conditioned", (True, False))
def test_control_is_two_launches_and_one_workspace(form, conditioned):
    """Workspace: float32 k, u and β per image, k alone in the identity form; nothing without a control."""
    shape = {"linear": (3, 6, 16), "conv": (3, 5, 8, 8), "identity": (3, 6, 24)}[form]
    projector = fold(form, 24, 16 if form == "linear" else 5)
    features, states = normal(*shape, key=form), normal(3, 24, key="c") if conditioned else None
    with Launches() as launches, Allocations() as seen:
        result = control.control_cross_attention(features, states, None, *projector.tensors())
    last = "identity_kernel" if form == "identity" else "project_kernel"
    assert [name for name, _ in launches.grids] == ["condition_kernel"] * conditioned + [last]
    columns = {"linear": 16 + 1, "conv": 16 * 5 + 1, "identity": 0}[form]
    assert outputs(seen) == [result.numel() * 4] + [3 * (24 + columns) * 4] * conditioned


@pytest.mark.parametrize("form", ("linear", "conv"))
def test_a_projector_without_score_maps_is_declined(form):
    """With the remedy; without a control no score is needed."""
    params = parameters(form, 24, 5)
    bare, whole = fold_projector(form, **params, score=False), fold_projector(form, **params)
    features = normal(9, 5, key="f") if form == "linear" else normal(1, 5, 8, 8, key="f")
    with pytest.raises(BackendUnavailable, match=r"score=True"):
        control_cross_attention(features, normal(1, 24, key="c"), bare, backend="triton")
    plain = control_cross_attention(features, None, bare, backend="triton")
    assert_same_bits(plain, control_cross_attention(features, None, whole, backend="triton"))
    assert "identity form only" in control_api._declined(whole, None)["cuda"]
    assert "triton" not in control_api._declined(whole, None)


def test_identity_rows_that_do_not_fit_registers_are_declined(monkeypatch):
    assert control_api._WIDEST_ROW == control.WIDEST
    monkeypatch.setattr(control_api, "_WIDEST_ROW", 16)
    with pytest.raises(BackendUnavailable, match=r"17.*16"):
        control_cross_attention(normal(2, 17, key="x"), None, fold("identity", 17), backend="triton")
    control_cross_attention(normal(2, 16, key="x"), None, fold("identity", 16), backend="triton")


def test_triton_is_asked_for_by_name_only():
    """The interpreter runs on the CPU for tests; `auto` does not choose it."""
    text = explain("append_visual_kv")
    assert "backend='auto': cpp" in text.splitlines()[0]
    assert any(line.split() == ["triton", "can", "run"] for line in text.splitlines())


STEPS = ((1 << 32) + 48, (1 << 30) + 48)
"""Elements from one index to the next: beyond 32 bits itself, and within them while two steps are not."""
AXES = (("conv", 0), ("conv", 1), ("conv", 2), ("conv", 3), ("linear", 0), ("linear", 1))


@pytest.mark.parametrize("step", STEPS, ids=("64-bit strides", "32-bit strides"))
@pytest.mark.parametrize("form, axis", AXES)
def test_features_that_wrap_at_32_bits(monkeypatch, form, axis, step):
    """Offsets that, cut to 32 bits, would land inside the tensor or before it."""
    monkeypatch.setattr(append_checks, "WRAPS", step)
    shape = (3, 3, 8, 4) if form == "conv" else (3, 3, 3)
    features, control, projector = normal(*shape, key="far"), normal(3, 24, key="c"), fold(form, 24, 3)
    want = control_cross_attention(features, control, projector, backend="triton")
    far = append_checks.wrapping(features, axis)
    assert_same_bits(control_cross_attention(far, control, projector, backend="triton"), want)


@pytest.mark.parametrize("name", ("q", "k", "v", "k_cache", "v_cache", "cos_sin", "positions"))
def test_append_offsets_of_32_bit_strides(monkeypatch, name):
    monkeypatch.setattr(append_checks, "WRAPS", STEPS[1])
    call = make(4, (6, 3), 16, capacity=4, table_rows=5)
    want = call.fresh()
    rotated = want.run("triton")
    far = replace(call, **{name: append_checks.wrapping(getattr(call, name), 0)})
    assert_same_bits(far.run("triton"), rotated)
    assert_same_bits(far.k_cache.contiguous(), want.k_cache)
    assert_same_bits(far.v_cache.contiguous(), want.v_cache)


def test_positions_outside_the_table_are_clamped():
    call = make(5, table_rows=64)
    call = replace(call, positions=torch.tensor([-1, -(1 << 40), 64, 1 << 40, 63]).expand(3, 5).contiguous())
    inside = replace(call.fresh(), positions=call.positions.clamp(0, 63))
    assert_same_bits(call.run("triton"), inside.run("triton"))
    assert_same_bits(call.k_cache, inside.k_cache)


@each_dtype
def test_append_equals_the_cpu(dtype):
    """Products and sums rounded one by one, in both: the same bits, not only the same accuracy."""
    call = make(37, (6, 3), 54, dtype=dtype, sections=(7, 9, 11))
    other = call.fresh()
    assert_same_bits(call.run("triton"), other.run("cpp"))
    assert_same_bits(call.k_cache, other.k_cache)
    assert_same_bits(call.v_cache, other.v_cache)


@pytest.mark.parametrize("form", ("linear", "conv", "identity"))
def test_scores_beyond_float16(form):
    """f·k = 98,304 does not fit float16, the projected token 2,048 + 98,304/2 does: the score is float32."""
    hidden, channels = 96, 3
    given = {
        "condition_norm": (torch.ones(hidden), torch.zeros(hidden)),
        "condition": (torch.zeros(hidden, hidden), torch.full((hidden,), 0.5)),
    }
    if form != "identity":
        shape = (hidden, channels, 4, 4) if form == "conv" else (hidden, channels)
        given["feature_norm"] = torch.ones(channels), torch.zeros(channels)
        given["feature"] = torch.zeros(shape), torch.full((hidden,), 2048.0)
    projector = fold_projector(form, **{name: tuple(t.half() for t in pair) for name, pair in given.items()})
    shape = {"linear": (2, 3, channels), "conv": (2, channels, 4, 8), "identity": (2, 3, hidden)}[form]
    features, states = torch.full(shape, 2048, dtype=torch.float16), torch.zeros(2, hidden, dtype=torch.float16)
    assert (control_cross_attention(features, states, projector, backend="triton") == 51200).all()
    one = control_cross_attention(features[:1], states[:1], projector, backend="triton")
    assert (one == 51200).all()


def test_accuracy_without_control_is_that_of_the_product():
    """The LayerNorm prologue alone, at full width."""
    params = parameters("linear", 64, 1024, torch.bfloat16)
    x = normal(40, 1024, key="x", dtype=torch.bfloat16)
    actual = control_cross_attention(x, None, fold_projector("linear", **params), backend="triton")
    exact, eager = composition(params, x, None), composition(params, x, None, None, torch.bfloat16)
    assert (actual.double() - exact).square().mean() <= (eager.double() - exact).square().mean() * 1.1


FORMS = ("append_visual_kv", "append_visual_kv_", "control_cross_attention", "control_cross_attention_into")


@pytest.mark.unpoisoned
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    given = append_cases(form, torch.float32) if form.startswith("append") else control_cases(form, torch.float32)
    for arguments in given[::3]:
        results = torch.library.opcheck(overload(form, "triton"), arguments)
        assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ("linear", "identity without control", "append_visual_kv_", "float8 caches"))
def test_compiled_equals_eager(name):
    with torch.no_grad():
        compare_compiled(*FUNCTIONS[name], "triton", "aot_eager")
