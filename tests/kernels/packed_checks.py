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


def rounding_of_x(x: Tensor, weight: Tensor, top: int = 32767) -> Tensor:
    """How far weights of integers may be off, [rows, N] float64: x is rounded to steps of its largest / top per 256
    columns, 16 bits or 8.
    """
    blocks = F.pad(x.abs().double(), (0, -x.shape[1] % 256)).unflatten(1, (-1, 256))
    steps = (blocks.amax(-1) / top / 2).repeat_interleave(256, 1)[:, : x.shape[1]]
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

    Weights of integers may be off by the rounding of x besides, in a plain product.
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
    if packed.scales is not None and x.numel():
        assert activation is None, "the bound is for a plain product"
        allowed = rounding_of_x(x.flatten(0, -2), weight, 127 if packed.dynamic else 32767)
        excess = (actual.double() - oracle).abs() - allowed.view(actual.shape)
        actual_without = oracle + excess.clamp_min(0)
        assert_twice_as_good(actual_without.to(x.dtype), eager, oracle)
    else:
        assert_twice_as_good(actual, eager, oracle)
