"""Choosing the next token from its logits: greedy, or seeded sampling with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ValueError for numbers out of range.

    temperature: divides the logits; 0 is greedy, the lowest id on ties. top_k: keep the k likeliest tokens (0: all).
    top_p: of these, keep the likeliest until their probabilities reach p (1: all), at least one. seed: of the draws.
    The settings of the published evaluation, temperature 0.95, top_k 10 and top_p 0.1, always leave one token: the
    likeliest of ten has at least a tenth, so they choose as greedy decoding does.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
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
        self._generator = torch.Generator().manual_seed(self.sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token from logits float32 [vocab]; NaN counts as 0 and infinities as the largest numbers."""
        logits = logits.nan_to_num()
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # A stable sort puts the lower id first on ties, as argmax does.
        values, tokens = (logits / self.sampling.temperature).nan_to_num().sort(descending=True, stable=True)
        probabilities = values[: self.sampling.top_k or None].softmax(0).double()
        before = probabilities.cumsum(0) - probabilities
        kept = probabilities[before < self.sampling.top_p].cumsum(0).cpu()
        draw = torch.rand((), dtype=torch.float64, generator=self._generator) * kept[-1]
        return int(tokens[min(int((kept <= draw).sum()), len(kept) - 1)])
