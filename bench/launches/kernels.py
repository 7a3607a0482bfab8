"""How many device kernels one operator of torch is, and which of its inputs they read.

One, unless said otherwise here. Views, allocations and metadata are none. Sources: the CUDA implementations of PyTorch
2.11; a copy or a fill that the driver may do without a kernel counts as one, because it occupies the stream as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention.varlen  # noqa: F401  (registers its operator)
from torch import Tensor

aten = torch.ops.aten

WHOLE = {aten.scaled_dot_product_attention, aten._fused_rms_norm, aten.rms_norm}
"""Composite operators that are one kernel on a GPU: flash attention, or memory-efficient attention under a mask."""

_NONE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten.detach_,
    aten.alias,
    aten.lift_fresh,
    aten._unsafe_view,
    aten.view,
    aten._reshape_alias,
    aten.set_,
    aten.resize_,
    aten.record_stream,
}
_SEVERAL = {aten.constant_pad_nd: 2, aten.sort: 4, aten.cumsum: 1, aten.topk: 2, aten.nonzero: 3}
"""A padded tensor is a fill and a copy; sort, topk and nonzero are several of CUB's."""
_ONLY_WRITES = {aten.fill_, aten.zero_, aten.copy_, aten.index_put_, aten.full_like, aten.zeros_like, aten.ones_like}
"""Their first argument is not read."""
_GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""They read as many bytes of their source as they return."""
_UNREAD = {
    "out",
    "normed",
    "q_out",
    "sums",
    "weights",
    "partials",
    "tickets",
    "logits",
    "tops",
    "choices",
    "tokens",
    "tables",
    "k_cache",
    "v_cache",
    "table",
    "cos_sin",
}
"""Parameters of our Triton kernels that are written, not read, where a kernel's own entry says nothing else; and the
table of angles, of which a token reads three rows of 512 bytes."""
_READ_BY = {"linear_add_kernel": {"partials"}, "resample_kernel": {"tables"}}
OPERATORS = {"append_visual_kv": 1, "control_cross_attention": 2, "roi_patches": 2, "roi_patch_embed": 3}
"""Kernels of one call of our operators, with a control and few regions, on Triton and on CUDA alike (there the third
of `roi_patch_embed` is the library's product): so the count does not depend on which of them is installed."""


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of the elements that `tensor` shows, those of an expanded axis once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= 1 if stride == 0 and size else size
    return count * tensor.itemsize


def of(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (name, tensors read) of every kernel of one operator."""
    packet = function.overloadpacket
    if function.is_view or packet in _NONE:
        return
    leaves = torch.utils._pytree.tree_leaves((list(args), kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if packet in _ONLY_WRITES:
        tensors = tensors[1:]
    if packet in _GATHERS:
        tensors = tensors[1:]
    name = packet.__name__.strip("_")
    if packet is torch.ops.torch_attn._varlen_attn:
        yield "zeros", []  # what dropout would need
    yield from [(name, tensors)] * _SEVERAL.get(packet, 1)


def triton_inputs(name: str, given: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a launch of one of our Triton kernels reads."""
    read = _READ_BY.get(name, set())
    tensors = {key.removesuffix("_ptr"): x for key, x in given.items() if isinstance(x, Tensor)}
    return [x for key, x in tensors.items() if key in read or key not in _UNREAD]


def shaped(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the operator's result, as fake tensors; of the `WHOLE` ones that torch knows no shapes for, by hand."""
    if function.overloadpacket is aten.scaled_dot_product_attention:
        q, _, v = args[:3]
        # [..., heads, T, D] as flash attention returns it: memory in the order [..., T, heads, D].
        out = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1]))
        return out.transpose(-2, -3)
    if function.overloadpacket is aten.rms_norm:
        return torch.empty_like(args[0])
    return function(*args, **kwargs)
