"""`control_cross_attention` at sizes for the interpreter; tests/kernels/conftest.py names what runs on it as it is."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import each_dtype
from tests.kernels.control_checks import RAGGED, check
from tests.triton import launches


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    launches.control(monkeypatch)


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch, few_programs: None) -> None:
    launches.control(monkeypatch, gemm=(256, 512, 256, 4, 1), condition=512)


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
