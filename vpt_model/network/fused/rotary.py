"""The vision tower's rotation, in place on the packed projection: q and k are read and written once, v is untouched.

packed [N, 3, heads, D], cos and sin float32 [N, 1, D / 2]: (x_i, x_{i+D/2}) → (x_i·c − x_{i+D/2}·s,
x_{i+D/2}·c + x_i·s), in float32, rounded once. Products and sums are rounded one by one, so the bits are those of
PyTorch's operations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vpt_model.network.capture import on_device

BLOCK_HEADS, WARPS = 8, 2


@triton.jit
def rotate_packed_kernel(
    packed,
    cos,
    sin,
    token_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program (i, j) takes of token i the j-th block of the heads of q and, behind them, of k."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_HALF)
    is_pair = pair < HALF
    mask = (head < 2 * HEADS)[:, None] & is_pair[None, :]
    c = tl.load(cos + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
    place = packed + token * token_stride + (head * 2 * HALF)[:, None] + pair[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = packed.dtype.element_ty
    tl.store(place, (first * c - second * s).to(dtype), mask=mask)
    tl.store(place + HALF, (second * c + first * s).to(dtype), mask=mask)


def rotate_packed_(packed: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate q and k of `packed` in place; each token of it is contiguous, and so are cos and sin."""
    tokens, _, heads, dim = packed.shape
    if not tokens:
        return
    with on_device(packed):
        rotate_packed_kernel[(tokens, triton.cdiv(2 * heads, BLOCK_HEADS))](
            packed,
            cos,
            sin,
            packed.stride(0),
            HEADS=heads,
            HALF=dim // 2,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_HALF=triton.next_power_of_2(dim // 2),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
