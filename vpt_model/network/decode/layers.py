"""The layers of the language model over one new token of each of a few conversations: five launches a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vpt_model.network.attention import Padded
from vpt_model.network.decode.attention import attend
from vpt_model.network.decode.linear_add import linear_add
from vpt_model.network.decode.norm_linear import norm_linear
from vpt_model.network.decode.norm_swiglu import norm_swiglu


class Layer(Protocol):
    """The weights of one layer; queries, keys and values, and gates and ups, one behind the other."""

    input_norm: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    o_weight: Tensor
    post_norm: Tensor
    gate_up_weight: Tensor
    down_weight: Tensor


def run(layers: Sequence[Layer], eps: float, x: Tensor, step: Padded, tickets: Tensor) -> Tensor:
    """Return hidden states [R, H] behind all layers, before the final norm. x: the tokens' embeddings, one per
    conversation.

    step: where keys and values are and where the new ones go. tickets: as of `Padded`, 0 before and after.
    """
    rotary = step.rotary
    for index, layer in enumerate(layers):
        qkv = norm_linear(x, layer.input_norm, eps, layer.qkv_weight, layer.qkv_bias)
        mixed = attend(
            qkv,
            rotary.table,
            rotary.sections,
            step.positions,
            step.slots,
            step.keys[index],
            step.values[index],
            *step.lengths,
            step.capacity,
            tickets,
        )
        x = linear_add(mixed, layer.o_weight, x, tickets)
        x = linear_add(norm_swiglu(x, layer.post_norm, eps, layer.gate_up_weight), layer.down_weight, x, tickets)
    return x
