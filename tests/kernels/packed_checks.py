"""Which kernels of `packed_linear` run, its inputs, and what each of its calls must fulfil."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import INTERPRETED, assert_twice_as_good
from tests.kernels.instruction_sets import Kernels
from vpt_kernels import PackedWeight, packed_linear

ACTIVATIONS = {
    None: lambda x: x,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

kernels = Kernels("vpt_packed_linear_kernels")
each_set = pytest.mark.parametrize("name", kernels.names)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the operator has no Triton implementation")


def composition(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, gated: bool
) -> Tensor:
    """The layer in PyTorch, in x's dtype throughout; the weight's rows are the gate's, then the others."""
    product = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if gated:
        gate, up = product.chunk(2, -1)
        product = ACTIVATIONS[activation](gate) * up
    else:
        product = ACTIVATIONS[activation](product)
    return product if residual is None else product + residual


def rounding_of_x(x: Tensor, weight: Tensor) -> Tensor:
    """How far integer weights may be off with few rows, [rows, N] float64: x is rounded to 16 bits per 256 columns."""
    blocks = F.pad(x.abs().double(), (0, -x.shape[1] % 256)).unflatten(1, (-1, 256))
    steps = (blocks.amax(-1) / 32767 / 2).repeat_interleave(256, 1)[:, : x.shape[1]]
    return steps @ weight.abs().double().T


def check(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str = "cpp",
    at_once: int = 1 << 30,
) -> None:
    """Calls of `at_once` rows are no further from float64 than twice PyTorch in x's dtype on the same weights.

    int8 and int4 weights of a plain product may be off by the rounding of x besides.
    """
    weight, both = packed.dequantize(), (activation, packed.gated)
    actual, eager = [], []
    for first in range(0, len(x), at_once):
        part = [None if t is None else t[first : first + at_once] for t in (x, residual)]
        actual.append(packed_linear(part[0], packed, bias, part[1], activation, backend=backend))
        eager.append(composition(part[0], weight, bias, part[1], *both))
    actual, eager = torch.cat(actual), torch.cat(eager)
    wide = [None if t is None else t.double() for t in (x, bias, residual)]
    oracle = composition(wide[0], packed.dequantize(torch.float64), *wide[1:], *both)
    assert actual.dtype == x.dtype and actual.is_contiguous()
    if packed.precision in ("int8", "int4") and x.numel():
        assert activation is None, "the bound is for a plain product"
        excess = (actual.double() - oracle).abs() - rounding_of_x(x.flatten(0, -2), weight).view(actual.shape)
        actual_without = oracle + excess.clamp_min(0)
        assert_twice_as_good(actual_without.to(x.dtype), eager, oracle)
    else:
        assert_twice_as_good(actual, eager, oracle)
