"""The one place that knows what the re-encoders' tensors are called: in the state dict, and in transformers.

transformers 5.18 renamed DINOv2's attention and the parts of its SwiGLU layer, which it split besides. The state dict
keeps the published names of the attention and, of SwiGLU, the new and divided ones, so that each file fits by views.
SAM has one set of names in all versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# (in the state dict, elsewhere): names of layers, which have a weight and a bias each.
_SYNONYMS = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("mlp.down_proj", "mlp.weights_out"),
)
_PACKED, _PARTS = "mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")
_LAYER = r"(?:^|\.)encoder\.layer\.\d+\."


def state_name(name: str) -> str:
    """Return the state dict's name of a tensor of DINOv2 under any version's name; every other name as it is."""
    for ours, theirs in _SYNONYMS:
        name = re.sub(rf"({_LAYER}){re.escape(theirs)}(?=\.(?:weight|bias)$)", rf"\g<1>{ours}", name)
    return name


def packed_name(name: str) -> str:
    """Return the name under which a file may hold the tensor together with others, one after the other; or its own.

    transformers stores SwiGLU's gate and up projection, in this order, as one tensor.
    """
    return re.sub(rf"({_LAYER})(?:{'|'.join(map(re.escape, _PARTS))})(?=\.(?:weight|bias)$)", rf"\g<1>{_PACKED}", name)


def state_for(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` under the names of `module`, one of transformers' encoders or of its parts, whatever their
    versions.

    The module's own names decide. Tensors are shared with `state`, but where the module wants gate and up in one; what
    it has no place for is returned too, so that loading it strictly raises.
    """
    divided: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = _state_names(name)
        divided |= zip(parts, tensor.chunk(len(parts)))
    loaded = {}
    for own in module.state_dict():
        parts = _state_names(own)
        if divided.keys() >= set(parts):
            tensors = [divided.pop(part) for part in parts]
            loaded[own] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return loaded | divided


def _state_names(name: str) -> list[str]:
    """Return the state dict's names of what a tensor under any version's name holds, in its order."""
    divided = re.split(rf"({_LAYER}){re.escape(_PACKED)}(?=\.(?:weight|bias)$)", name)
    if len(divided) == 1:
        return [state_name(name)]
    before, layer, after = divided
    return [f"{before}{layer}{part}{after}" for part in _PARTS]
