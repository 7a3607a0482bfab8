"""`linear`, `gated_linear` and `onto`: every product of the model with its weights, and what follows it.

A packed weight (on a CPU) takes all of it into one call of `packed_linear`: weights as stored, float32 arithmetic. A
tensor takes torch's F.linear, faster for float32 on the CPU, where F.linear is MKL, which does not use every thread or
vector unit of every machine (AMD EPYC, 2 threads, 2B widths: one row reads its weights at 20 of 48 GB/s, 284 rows run
at 180 GFLOP/s). A batched product over blocks of weight rows reads at 45 GB/s, oneDNN at 41 GB/s (more than the batch
where a row is long) and multiplies at 400 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_kernels import PackedWeight, packed_linear
from vpt_model.network import fused
from vpt_model.network.state import Weight

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# A divisor of every width in use and at least as many blocks as the threads of one socket.
_BLOCKS = 64
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": fused.quick_gelu}


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Return activation(x·Wᵀ + bias) of x [n, K], weight [N, K], bias [N]: [n, N] in x's dtype.

    activation: "gelu", "quick_gelu" or None.
    """
    if isinstance(weight, PackedWeight):
        return packed_linear(x, weight, bias, activation=activation)
    out = _product(x, weight, bias)
    return out if activation is None else _ACTIVATIONS[activation](out)


def gated_linear(x: Tensor, weight: Weight) -> Tensor:
    """Return silu(x·Gᵀ)·(x·Uᵀ) of x [n, K] and a weight whose rows are G's and then U's, [2·N, K]: [n, N]."""
    if isinstance(weight, PackedWeight):
        return packed_linear(x, weight, activation="silu")
    return fused.silu_mul(_product(x, weight, None))


def onto(x: Tensor, y: Tensor, weight: Weight, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return x + y·Wᵀ + bias, as it costs least: the sum and None, or x and what the next norm is to add."""
    if isinstance(weight, PackedWeight):
        return packed_linear(y, weight, bias, x), None
    return x, _product(y, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows, columns = weight.shape
    if x.shape[0] == 1 and rows >= columns:
        blocks = gcd(rows, _BLOCKS)
        out = torch.bmm(weight.unflatten(0, (blocks, -1)), x.t().expand(blocks, columns, 1)).view(1, rows)
        return out if bias is None else out.add_(bias)
    if _HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
