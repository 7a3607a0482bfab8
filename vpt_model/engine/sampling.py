"""Choosing the next token from its logits: greedy, or seeded sampling with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vpt_model.config import require_integer, shown
from vpt_model.network.capture import uploaded
from vpt_model.network.decode.reference import greedy


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ValueError for numbers out of range.

    temperature: divides the logits; 0 is greedy, the lowest id on ties. top_k: keep the k most probable (0: all).
    top_p: of these, keep the most probable until they reach p together (1: all), at least one. seed: of the draws.
    The settings of the published evaluation, temperature 0.95, top_k 10 and top_p 0.1, always leave one token: the
    most probable of ten has at least a tenth, so they choose as greedy decoding does.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {shown(value)}; it must be a number")
        require_integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        require_integer("top_k", self.top_k, -(1 << 63), (1 << 63) - 1)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


class Sampler:
    """The choices of one conversation: equal seeds and logits give equal tokens, on every device."""

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()
        self._generator = torch.Generator("cpu").manual_seed(self.sampling.seed)
        self._last: Tensor | None = None
        self._returned: Tensor | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most probable token, without a draw."""
        return self.sampling.temperature == 0

    def __call__(self, logits: Tensor, argmax_token: Tensor | None = None) -> int | None:
        """Return the next token from logits float32 [vocab], or None if one is NaN; infinities count as the largest
        numbers.

        argmax_token: `greedy(logits)` where that is known already. The token is the one number that is read from a GPU.
        """
        token = int(self.choose(logits) if argmax_token is None or not self.is_greedy else argmax_token)
        return None if token < 0 else token

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next token, −1 if a logit is NaN, as an int64 number where the logits are, without a wait."""
        return greedy(logits) if self.is_greedy else self._draw(logits)

    def take_back(self) -> None:
        """Forget the last choice: the next one is made by the same draw."""
        self._returned = self._last

    def _draw(self, logits: Tensor) -> Tensor:
        scaled = (logits.nan_to_num() / self.sampling.temperature).nan_to_num()
        values, tokens = _candidates(scaled, self.sampling)
        probabilities = values.softmax(0).double()
        kept = probabilities.cumsum(0) - probabilities < self.sampling.top_p
        ends = torch.where(kept, probabilities, 0).cumsum(0)
        draw, self._returned = self._returned, None
        if draw is None:
            draw = torch.rand((), dtype=torch.float64, device="cpu", generator=self._generator)
        self._last = draw
        draw = uploaded(draw, ends.device)
        place = torch.minimum((ends <= draw * ends[-1]).sum(), kept.sum() - 1)
        return torch.where(logits.isnan().any(), -1, tokens.gather(0, place[None])[0])


def _candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the scores that can be drawn and their tokens, the most probable first and the lower id on ties.

    All are returned as they stand where their order does not matter. The whole vocabulary is sorted for top-p without
    top-k only.
    """
    if sampling.top_k == 0 and sampling.top_p == 1:
        return scores, torch.arange(len(scores), device=scores.device)
    if sampling.top_k == 0:
        return scores.sort(descending=True, stable=True)
    # As integers float32 numbers keep their order; with the ids behind them there are no ties. -0.0 becomes 0.0.
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(len(scores), device=scores.device)
    keys = (ordered << 32) | (0xFFFFFFFF - ids)
    tokens = 0xFFFFFFFF - (keys.topk(min(sampling.top_k, len(scores))).values & 0xFFFFFFFF)
    return scores.gather(0, tokens), tokens
