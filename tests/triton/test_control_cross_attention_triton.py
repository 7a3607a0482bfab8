"""The tests of `control_cross_attention`, on Triton's kernels in blocks large enough for the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import each_dtype
from tests.kernels.test_control_cross_attention import (  # noqa: F401
    RAGGED,
    check,
    test_conv_flattening_order,
    test_conv_strides,
    test_into_equal_rows_and_empty_buffer,
    test_into_skips_rows_beyond_32_bits,
    test_into_the_buffer_that_holds_the_features,
    test_into_writes_its_rows_only,
    test_large_scores,
    test_means_far_from_zero,
    test_nan_control_of_an_empty_image,
    test_nan_stays_in_its_image,
    test_nothing_to_project,
    test_offsets_beyond_32_bits,
    test_row_strides,
    test_runs_repeat_and_inputs_stay,
    test_toy,
    test_zero_key_and_no_control_return_f,
)


def set_blocks(monkeypatch: pytest.MonkeyPatch, gemm: tuple, condition: int) -> None:
    from vpt_kernels.control_cross_attention import triton

    monkeypatch.setattr(triton, "GEMM_LAUNCHES", dict.fromkeys(triton.GEMM_LAUNCHES, gemm))
    monkeypatch.setattr(
        triton, "CONDITION_LAUNCHES", {"one image": (1, condition, 512, 4), "images": (4, condition, 512, 4)}
    )
    monkeypatch.setattr(triton, "IDENTITY_LAUNCHES", {"narrow": (64, 4), "wide": (64, 8)})


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter milliseconds whatever its size; the shipped blocks have a test of their own."""
    set_blocks(monkeypatch, (64, 64, 64, 4, 1), 64)


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch, few_programs: None) -> None:
    set_blocks(monkeypatch, (256, 512, 256, 4, 1), 512)


@each_dtype
@pytest.mark.parametrize("hidden, lengths", ((1536, "sixteen"), (3584, "three"), (3584, "empty ends"), (31, "three")))
def test_identity(large_blocks, dtype, hidden, lengths):
    lengths = RAGGED[lengths]
    check("identity", hidden, (sum(lengths), hidden), lengths, dtype, "triton", rounds=2)


@each_dtype
@pytest.mark.parametrize("hidden, shape", ((1536, (1, 256, 1024)), (3584, (37, 1024)), (1536, (3, 40, 1024))))
def test_linear(large_blocks, dtype, hidden, shape):

    check("linear", hidden, shape, None, dtype, "triton", rounds=2)


@each_dtype
@pytest.mark.parametrize("conditioned", (True, False))
@pytest.mark.parametrize("lengths", ("one", "sixteen", "empty ends"))
def test_linear_ragged(large_blocks, dtype, conditioned, lengths):
    lengths = RAGGED[lengths]
    check("linear", 160, (sum(lengths), 96), lengths, dtype, "triton", conditioned=conditioned, rounds=3)


@each_dtype
@pytest.mark.parametrize("conditioned", (True, False))
def test_conv(dtype, conditioned):
    for shape in ((3, 8, 8, 12), (1, 5, 12, 4)):
        check("conv", 24, shape, None, dtype, "triton", conditioned=conditioned, rounds=4)


@each_dtype
@pytest.mark.parametrize("hidden, channels", ((7, 5), (1, 1), (31, 67)))
def test_odd_widths(dtype, hidden, channels):
    check("linear", hidden, (11, channels), [4, 7], dtype, "triton", rounds=8)
    check("identity", hidden, (11, hidden), [4, 7], dtype, "triton", rounds=8)


@pytest.mark.slow
def test_conv_at_sam_size(large_blocks):
    check("conv", 1536, (1, 256, 64, 64), None, torch.bfloat16, "triton")
