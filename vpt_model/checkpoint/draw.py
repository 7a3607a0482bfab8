"""Random weights: a whole state dict, or tensors that are drawn when they are taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpt_model.checkpoint.shapes import EMBEDDING, HEAD, expected_shapes, fused_groups
from vpt_model.config import ModelConfig

_DRAWN = 1 << 20
"""Random numbers that are float32 at a time."""
_GAINS = ("lambda1",)
_TABLES = ("cls_token", "mask_token", "pos_embed", "position_embeddings")
Progress = Callable[[int, int], None]
"""Is told how many bytes of how many are done."""


def random_state(
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda done, total: None,
) -> dict[str, Tensor]:
    """Return a random state dict, the same for the same config and seed (bf16 and fp16 are roundings of the float32
    values).

    Takes no more memory than the weights: they are drawn in pieces to where they stay, and what the language model
    fuses is adjacent.

    Scales keep activations and logits of order one (float32 noise in logits stays well below 1e-4), attention peaked
    enough that single tokens matter, and the projector's rank-one term half the features' size.
    """
    state, draw = empty_state(config, dtype), _Draw(seed)
    total, done = sum(tensor.nbytes for tensor in _apart(config, state).values()), 0
    for name, tensor in _apart(config, state).items():
        draw(name, tensor)
        done += tensor.nbytes
        progress(done, total)
    return state


def random_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Drawn]:
    """Return what `random_state` does as tensors that are not drawn yet, for `Model.from_state`.

    So a model that keeps its weights in fewer bits never has all of them in `dtype` in memory.
    """
    shapes = expected_shapes(config)
    source = _Source(_apart(config, shapes), seed, dtype)
    weights = {name: Drawn(name, shape, dtype, source) for name, shape in shapes.items()}
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    return weights


@dataclass(frozen=True, eq=False)
class Drawn:
    """A random tensor on the CPU that is drawn when it is taken."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    _source: _Source
    device = torch.device("cpu")

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def take(self) -> Tensor:
        """Return the tensor, which nobody keeps for another time. Raises ValueError when it is asked for again."""
        return self._source.take(self.name)


class _Source:
    """Tensors that one generator draws in the order of their names, whatever the order in which they are taken.

    What is drawn before what was asked for is in memory until it is taken, too.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> None:
        self._coming, self._passed = iter(shapes.items()), dict[str, Tensor]()
        self._draw, self._dtype = _Draw(seed), dtype

    def take(self, name: str) -> Tensor:
        while name not in self._passed:
            coming, shape = next(self._coming, ("", ()))
            if not coming:
                raise ValueError(f"{name} was taken before: keep it, or call random_weights again")
            self._passed[coming] = torch.empty(shape, dtype=self._dtype, device="cpu")
            self._draw(coming, self._passed[coming])
        return self._passed.pop(name)


class _Draw:
    """Fills one tensor after the other with random numbers."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        # The longest of `_pieces`; memory that is new for each costs as much as the numbers.
        self._drawn = torch.empty(2 * _DRAWN, dtype=torch.float32, device="cpu")

    def __call__(self, name: str, tensor: Tensor) -> None:
        if name.endswith(_GAINS) or (name.endswith("weight") and ("norm" in name or "ln_q" in name)):
            scale, offset = 0.1, 1.0
        else:
            scale, offset = 0.1 if name.endswith("bias") else _weight_std(name, tuple(tensor.shape)), 0.0
        for piece in _pieces(tensor.view(-1)):
            drawn = self._drawn[: len(piece)].normal_(generator=self._generator)
            piece.copy_(drawn.mul_(scale).add_(offset))


def _apart(config: ModelConfig, named: dict[str, Any]) -> dict[str, Any]:
    """Return all but a head that is the embedding."""
    return {name: one for name, one in named.items() if not (name == HEAD and config.tie_word_embeddings)}


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    """Return parts of a flat tensor of which each draws what it would within the whole.

    normal_ fills 16 numbers at a time, and fewer than those in another way: no part is shorter than `_DRAWN`.
    """
    count = max(1, len(flat) // _DRAWN)
    return flat.tensor_split([index * _DRAWN for index in range(1, count)])


def _weight_std(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith(_TABLES):
        return 0.5
    fan_in = math.prod(shape[1:])
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return math.sqrt(2.0 / fan_in)
    if name.endswith("linear_condition.weight"):
        # out = f + (f·k)k with k of variance s² adds a term of relative size s²·sqrt(width): here one half.
        return math.sqrt(0.5 / math.sqrt(fan_in) / fan_in)
    return 1.0 / math.sqrt(fan_in)


def empty_state(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return uninitialised tensors of `expected_shapes`; those that `fused_groups` joins follow each other in one
    buffer.
    """
    shapes = expected_shapes(config)
    state = dict.fromkeys(shapes, torch.empty(0, dtype=dtype, device="cpu"))
    for names in fused_groups(config).values():
        rows = [shapes[name][0] for name in names]
        buffer = torch.empty(sum(rows), *shapes[names[0]][1:], dtype=dtype, device="cpu")
        state |= zip(names, buffer.split(rows), strict=True)
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    return state
