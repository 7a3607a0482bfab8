"""The repaired interpreter computes what the tensor cores would; what it cannot do right, it refuses."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.helpers import assert_same_bits, normal


@triton.jit
def _round_trip(x, wide, y, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    value = tl.load(x + index)
    tl.store(wide + index, value.to(tl.float32))
    tl.store(y + index, (value.to(tl.float32) * 1.1).to(tl.bfloat16), mask=index >= 0)


@triton.jit
def _product(a, b, c, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.dot(tl.load(a + index), tl.load(b + index), tl.zeros((SIZE, SIZE), tl.float32))
    tl.store(c + index, total)


@triton.jit
def _bfloat16_sum(x, y, COUNT: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, COUNT)), 0).to(tl.float32))


@triton.jit
def _bfloat16_product(x, y, COUNT: tl.constexpr):
    value = tl.load(x + tl.arange(0, COUNT))
    tl.store(y + tl.arange(0, COUNT), value * value)


@triton.jit
def _float8(x, y, COUNT: tl.constexpr):
    tl.store(y + tl.arange(0, COUNT), tl.load(x + tl.arange(0, COUNT)).to(tl.float8e4nv).to(tl.uint8, bitcast=True))


def test_casts_round_to_nearest_even():
    x = torch.cat([normal(1000, key="casts", scale=3), torch.tensor([0.0, -0.0, 3e38, float("inf"), float("nan")])])
    x = torch.cat([x, torch.arange(19).float()]).bfloat16()
    assert x.numel() == 1024
    wide, y = torch.empty(1024), torch.empty(1024, dtype=torch.bfloat16)
    _round_trip[(1,)](x, wide, y, 1024)
    assert_same_bits(wide, x.float())
    assert y.isnan().tolist() == x.isnan().tolist()
    assert_same_bits(y.nan_to_num(), (x.float() * 1.1).bfloat16().nan_to_num())


def test_ties():
    ties = (torch.arange(256, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    from tests.triton.bf16_interpreter import narrow

    assert_same_bits(torch.from_numpy(narrow(ties.numpy()).view("int16")).view(torch.bfloat16), ties.bfloat16())


def test_matrix_product():
    a, b = (normal(32, 32, key=name, dtype=torch.bfloat16) for name in "ab")
    c = torch.empty(32, 32)
    _product[(1,)](a, b, c, 32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kernel", (_bfloat16_sum, _bfloat16_product, _float8), ids=lambda k: k.__name__)
def test_what_would_be_wrong_is_refused(kernel):
    x = torch.ones(16) if kernel is _float8 else torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="integers|float32 first"):
        kernel[(1,)](x, torch.empty(16), 16)
