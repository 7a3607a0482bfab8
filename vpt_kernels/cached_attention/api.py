"""Attention of new tokens over cached keys and values of another precision."""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_kernels.backends import bind
from vpt_kernels.checks import require_flag, require_inference, require_tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def cached_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, causal: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return softmax attention of new tokens over what is cached, each key read once for all query heads that share it.

    Scores, exponentials and sums are float32 whatever is cached; the result is rounded once.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16 (float64 on the reference), rotated, the last dimension contiguous.
        keys, values: [L, Hkv, D], Hq a multiple of Hkv, of one dtype, which need not be q's; any strides but the last,
            which is 1.
        causal: The last T keys are the new tokens' own, and token t sees L − T + t + 1 of all; else every token sees
            all.
        backend: "auto", "cpp" or "reference".

    Returns:
        The mixed values [T, Hq, D] in q's dtype, new and contiguous, and the natural logarithm of every softmax's sum,
        float32 [T, Hq], by which attention over several caches is merged. Without keys: 0 and −∞. The same input gives
        the same bits with any number of threads.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, strides or devices do not fit.
        BackendUnavailable: An explicit backend cannot run here.

    Source: `torch.nn.functional.scaled_dot_product_attention` with enable_gqa, its mask aligned at the lower right.
    """
    require_tensor("q", q, None, None, 3)
    require_tensor("keys", keys, None, q.device, 3)
    require_tensor("values", values, keys.dtype, q.device, 3)
    require_flag("causal", causal)
    tokens, heads, dim = q.shape
    stored, kv_heads, width = keys.shape
    if keys.shape != values.shape or width != dim or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} must be [T, Hq, D] and "
            "twice [L, Hkv, D], with Hq a multiple of Hkv"
        )
    if causal and tokens > stored:
        raise ValueError(f"{tokens} tokens and {stored} keys: where causal, the last keys are the tokens' own")
    if keys.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"keys are {keys.dtype}; they must be one of {', '.join(map(str, FLOATS))}")
    for name, tensor in (("q", q), ("keys", keys), ("values", values)):
        if dim > 1 and tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last dimension must be contiguous")
    require_inference(q=q, keys=keys, values=values)
    wide = {"cpp": "it reads keys of float32, bfloat16 and float16"} if keys.dtype == torch.float64 else {}
    op = bind("cached_attention", "cached_attention", backend, q.device, q.dtype, wide)
    return op(q, keys, values, causal)
