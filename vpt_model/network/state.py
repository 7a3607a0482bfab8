"""A state dict on its way into a model: which tensors are weights of products, and how those are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from vpt_kernels import BackendUnavailable, PackedWeight, pack_weight, packed_linear
from vpt_model.checkpoint.draw import Drawn
from vpt_model.checkpoint.packed import precision_of
from vpt_model.checkpoint.shapes import fused_name
from vpt_model.checkpoint.weights import release, return_free_memory

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8", "int4", "w8a8")
"""In which a model's weights may be kept; auto: as they are stored; w8a8: int8, and activations in 8 bits too."""
_TRIMMED_EVERY = 32 << 20
"""Bytes after which what packing has freed goes back to the system: up to a sixth lies in gaps otherwise."""
_PRODUCT = re.compile(
    r"(_proj|lm_head|embed_tokens)\.weight$|^visual.*(qkv|proj|fc\d|mlp\.\d)\.weight$|^(detection|seg)_model\..*\.weight$"
)
Weight = Tensor | PackedWeight
Progress = Callable[[int], None]
"""Is told how many bytes of a state dict have found their place."""


def packed_precision(weights: str | None, stored: torch.dtype, device: torch.device) -> str | None:
    """Return the precision in which products' weights are packed, or None where, as for None, they stay what they are.

    Packed weights are a CPU's: there activations are float32, whatever is stored. Triton's interpreter stands for a
    GPU, and without the C++ kernels packed weights would be unpacked in every call: `auto` packs in neither.

    Raises ValueError for an unknown name, and for a precision that cannot be had on the device.
    """
    if weights is None:
        return None
    if weights not in PRECISIONS:
        raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(PRECISIONS)}, or None")
    name = str(stored).removeprefix("torch.")
    packs = device.type == "cpu" and name in PRECISIONS
    if weights == "auto":
        return name if packs and _packing_pays() else None
    if packs:
        return weights
    if weights != name:
        raise ValueError(
            f"weights is {weights!r} for {name} tensors on {device}: another precision than the stored one is kept for "
            "float32, bfloat16 and float16 weights on a CPU only; use 'auto', or convert the checkpoint"
        )
    return None


@cache
def _packing_pays() -> bool:
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:
        packed_linear(one, pack_weight(one), backend="cpp")
    except BackendUnavailable:
        return False
    return os.environ.get("TRITON_INTERPRET") != "1"


class State:
    """The tensors of a model under the checkpoint's names, each handed out once in the form in which it is kept.

    packed: the precision of packed weights, or None. dtype: of activations, and of every tensor that is no product's
    weight. cache_dtype: of keys and values. consume: tensors leave the dict that was given, so that no weight is in
    memory twice. What is drawn when it is taken (`Drawn`) is drawn here, and best in the order of its names.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | Drawn | PackedWeight],
        weights: str | None = "auto",
        consume: bool = False,
        progress: Progress = lambda done: None,
    ) -> None:
        first = next(one for one in tensors.values() if not isinstance(one, PackedWeight))
        ready = precision_of(tensors)
        if ready is None:
            self.packed = packed_precision(weights, first.dtype, first.device)
        elif weights in ("auto", ready):
            self.packed = ready
        else:
            raise ValueError(
                f"weights is {weights!r}, and these are stored packed in {ready}: use 'auto', or the checkpoint that "
                "they were converted from"
            )
        self.dtype = torch.float32 if self.packed else first.dtype
        self.device = first.device
        # A cache is as exact as the weights that fill it; next to weights of integers bfloat16 costs nothing.
        cached = {"float32": torch.float32, "float16": torch.float16}
        self.cache_dtype = cached.get(self.packed, torch.bfloat16) if self.packed else self.dtype
        self._tensors = tensors
        self._taken: dict[str, Tensor] = {}
        self._consume, self._progress, self._done, self._trimmed = consume, progress, 0, 0

    def weight(self, *names: str, gated: bool = False) -> Weight:
        """Return the weight of one product: the rows of all names; dimensions behind the first are one.

        gated: the first name's product is the gate of the second's. What is packed already is under one name.
        """
        ready = self._tensors.get(fused_name(names[0]))
        if isinstance(ready, PackedWeight):
            self._finish([fused_name(names[0])])
            return ready
        parts = [self._take(name).flatten(1) for name in names]
        kept = stack(parts) if self.packed is None else pack_weight(parts, self.packed, gated=gated)
        self._finish(names)
        return kept

    def table(self, name: str) -> Tensor:
        """Return a tensor of which single rows are read, as it is stored."""
        return self._take(name)

    def tensor(self, *names: str) -> Tensor:
        """Return a bias, a norm or whatever else is no product's weight: all names' rows, in the activations' dtype."""
        parts = [self._take(name) for name in names]
        kept = stack(parts).to(self.dtype)
        if kept.data_ptr() != parts[0].data_ptr():
            self._finish(names)
        return kept

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return every `tensor` whose name begins with `prefix`, under its name."""
        return {name: self.tensor(name) for name in list(self._tensors) if name.startswith(prefix)}

    def within(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix`, without it, as they are stored, and keep none of them."""
        names = [name for name in self._tensors if name.startswith(prefix)]
        found = {name.removeprefix(prefix): self._take(name) for name in names}
        self._finish(names, released=False)
        return found

    def finish(self, name: str) -> None:
        """Count a tensor as placed that is another one's, too."""
        self._finish([name])

    def _take(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        assert not isinstance(tensor, PackedWeight), f"{name} is packed, and is no product's weight"
        if isinstance(tensor, Drawn):
            # Once, whoever reads it again before it is finished.
            if tensor.name not in self._taken:
                self._taken[tensor.name] = tensor.take()
            tensor = self._taken[tensor.name]
        return tensor.detach()

    def _finish(self, names: Sequence[str], released: bool = True) -> None:
        for name in names:
            tensor = self._tensors[name]
            self._done += tensor.nbytes
            if isinstance(tensor, Drawn):
                self._taken.pop(tensor.name, None)
            if self._consume and isinstance(self._tensors, dict):
                del self._tensors[name]
                if released and isinstance(tensor, Tensor):
                    release(tensor)
        if self._done - self._trimmed > _TRIMMED_EVERY:
            self._trimmed = self._done
            return_free_memory()
        self._progress(self._done)


def rounded(state: Mapping[str, Tensor | Drawn], weights: str) -> dict[str, Tensor]:
    """Return the tensors with numbers that weights kept in a precision hold exactly, in the dtype that they have.

    So models that keep them in any other way compute with the same numbers. auto: as they are. Of integers: the
    matrices of layers alone. What is one tensor under two names stays one.
    """
    found: dict[int, Tensor] = {}
    for name, one in state.items():
        if id(one) not in found:
            found[id(one)] = _rounded(name, one.take() if isinstance(one, Drawn) else one, weights)
    return {name: found[id(one)] for name, one in state.items()}


def _rounded(name: str, tensor: Tensor, weights: str) -> Tensor:
    if weights == "auto":
        return tensor
    if weights not in ("int8", "int4", "w8a8"):
        return tensor.to(getattr(torch, weights)).to(tensor.dtype)
    if tensor.dim() == 2 and _PRODUCT.search(name):
        return pack_weight(tensor, weights).dequantize(tensor.dtype)
    return tensor


def stack(parts: list[Tensor]) -> Tensor:
    """Return the rows of all parts, without a copy where each part begins in memory where the one before it ends."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end or not _same_storage(part, first):
            return torch.cat(parts)
        end += part.nbytes
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
