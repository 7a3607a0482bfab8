"""`linear`: torch's F.linear, faster for float32 on the CPU.

F.linear multiplies float32 matrices with MKL, which does not use every thread or vector unit of every machine (AMD
EPYC, 2 threads, 2B widths: one row reads its weights at 20 of 48 GB/s, 284 rows run at 180 GFLOP/s). A batched product
over blocks of weight rows reads at 45 GB/s, oneDNN at 41 GB/s (more than the batch where a row is long) and multiplies
at 400 GFLOP/s.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# A divisor of every width in use and at least as many blocks as the threads of one socket.
_BLOCKS = 64


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [n, K] times weight [N, K] transposed, plus bias [N]: [n, N] in x's dtype."""
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
