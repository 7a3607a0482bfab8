"""What the products of few rows share: normalised rows, a stream of weights, sums in float32, and their launches.

A product of M rows reads its weights once and does little else. One row is multiplied in registers, by every thread
where its 16 bytes of weights arrive; more rows, up to 8, are one tile of 16 of the tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.decode import MOST_ROWS


class Launch(NamedTuple):
    """How a launch is divided: `rows` of the tile, `outputs` rows of weights a program, `step` columns at a time."""

    rows: int
    outputs: int
    step: int
    warps: int
    stages: int

    def options(self, x: Tensor) -> dict[str, Any]:
        """Return what the kernel of a product of rows like x is told beside its tensors and sizes."""
        pdl = overlaps(x)
        blocks = {"PDL": pdl, "ROWS": self.rows, "BLOCK_N": self.outputs, "BLOCK_K": self.step}
        how = {"num_warps": self.warps, "num_stages": self.stages, "launch_pdl": pdl}
        return blocks | how


ONE_ROW = Launch(rows=1, outputs=8, step=512, warps=4, stages=1)
ROWS = Launch(rows=16, outputs=16, step=256, warps=2, stages=4)
FLOAT32 = Launch(rows=16, outputs=16, step=32, warps=4, stages=1)
"""One row: 8 KB of bfloat16 in flight a program, two to eight programs a multiprocessor. More rows: the smallest tile
of the tensor cores and three steps of 8 KB under way. From reasoning about an H100, not from measurements."""


@triton.jit
def prefetch_weights(weight, output, outputs, begin, end, columns, BLOCK_K: tl.constexpr):
    """Ask for a program's weights, columns `begin` to `end` of rows `output`, to come to L2: one address per line."""
    line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    row = tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * columns
    for start in range(begin, end, BLOCK_K):
        k = tl.minimum(start + tl.arange(0, BLOCK_K // line) * line, columns - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [weight + row + k[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_weights(weight, output, outputs, k, end, columns):
    """Load the weights [outputs, columns] as [N, K], 0 from column `end` on."""
    place = output.to(tl.int64)[:, None] * columns + k[None, :]
    is_weight = (output < outputs)[:, None] & (k < end)[None, :]
    return tl.load(weight + place, mask=is_weight, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_rows(x, row, rows, k, end, columns):
    """Load the rows x [rows, columns] as [R, K], 0 from column `end` on."""
    return tl.load(x + row[:, None] * columns + k[None, :], mask=(row < rows)[:, None] & (k < end)[None, :], other=0.0)


@triton.jit
def inverse_roots(x, row, rows, columns, eps, BLOCK_K: tl.constexpr):
    """Return 1 / √(mean square + eps) of each row of x: float32 [R, 1]."""
    squares = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    for start in range(0, columns, BLOCK_K):
        part = load_rows(x, row, rows, start + tl.arange(0, BLOCK_K), columns, columns).to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(squares, 1) / columns + eps)[:, None]


@triton.jit
def load_normed(x, norm, row, rows, k, columns, inverse):
    """Load x · inverse · norm as [R, K], rounded to x's dtype after each product as Qwen2-VL's RMSNorm does."""
    part = load_rows(x, row, rows, k, columns, columns)
    scaled = (part.to(tl.float32) * inverse).to(part.dtype).to(tl.float32)
    weight = tl.load(norm + k, mask=k < columns, other=0.0).to(tl.float32)
    return (scaled * weight[None, :]).to(part.dtype)


@triton.jit
def no_products(ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return sums of no columns. One row's stay apart per column of a step: threads exchange nothing in a loop."""
    if ROWS == 1:
        return tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    else:
        return tl.zeros([ROWS, BLOCK_N], tl.float32)


@triton.jit
def add_products(total, x, w, ROWS: tl.constexpr):
    """Return `total` and the products of rows x [R, K] with weights w [N, K]."""
    if ROWS == 1:
        return total + w.to(tl.float32) * x.to(tl.float32)
    else:
        return tl.dot(x, tl.trans(w), total, input_precision="ieee")


@triton.jit
def sum_products(total, ROWS: tl.constexpr):
    """Return the sums over columns, float32 [R, N]."""
    if ROWS == 1:
        return tl.sum(total, 1)[None, :]
    else:
        return total


def launch_of(x: Tensor) -> Launch:
    """Return the launch for rows x [M, K]. Raises ValueError for more rows than a tile has."""
    if not 1 <= len(x) <= MOST_ROWS:
        raise ValueError(f"{len(x)} rows were given; these products are for 1 to {MOST_ROWS}: use a library's")
    if len(x) == 1:
        return ONE_ROW
    return FLOAT32 if x.dtype == torch.float32 else ROWS


def overlaps(x: Tensor) -> bool:
    """Return whether a launch may begin while the one before it ends: sm_90 and later."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
