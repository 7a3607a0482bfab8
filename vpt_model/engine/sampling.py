"""Choosing the next token from its logits: greedy, or seeded sampling with temperature, top-k and top-p."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt_model.config import require_integer, shown
from vpt_model.network.capture import uploaded
from vpt_model.network.decode.reference import greedy

DRAWS = 256
"""Tokens whose draws are made, and taken to the device, together."""


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
        for name, low, high in (("seed", -(1 << 63), (1 << 64) - 1), ("top_k", 0, (1 << 63) - 1)):
            object.__setattr__(self, name, require_integer(name, getattr(self, name), low, high))
        if not 0 <= self.temperature <= sys.float_info.max:
            raise ValueError(f"temperature is {shown(self.temperature)}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {shown(self.top_p)}; it must lie in (0, 1]")


class Sampler:
    """The choices of one conversation: equal seeds and logits give equal tokens, on every device."""

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()
        self._generator = torch.Generator("cpu").manual_seed(self.sampling.seed)
        self._draws = torch.empty(0, dtype=torch.float64, device="cpu")

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most probable token, without a draw."""
        return self.sampling.temperature == 0

    @property
    def limits(self) -> tuple[float, float, float]:
        """Temperature, top-k (infinity where it is all) and top-p, as `drawn` takes them."""
        return self.sampling.temperature, self.sampling.top_k or float("inf"), self.sampling.top_p

    def __call__(self, logits: Tensor, argmax_token: Tensor | None = None) -> int | None:
        """Return the next token from logits float32 [vocab], or None if one is NaN; infinities count as the largest
        numbers.

        argmax_token: `greedy(logits)` where that is known already. The token is the one number that is read from a GPU.
        """
        token = int(self.choose(logits) if argmax_token is None or not self.is_greedy else argmax_token)
        return None if token < 0 else token

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next token, −1 if a logit is NaN, as an int64 number where the logits are, without a wait."""
        if self.is_greedy:
            return greedy(logits)
        given = torch.tensor([*self.limits, *self.draws(1).tolist()], dtype=torch.float64, device="cpu")
        temperature, _, top_p, uniform = uploaded(given, logits.device).split(1)
        self.spend()
        values, tokens = _candidates(logits.nan_to_num(), self.sampling)
        limited = self.sampling.top_p < 1
        place = _draw(_masses(values[None], temperature), top_p if limited else None, uniform)
        return torch.where(logits.isnan().any(), -1, tokens.gather(0, place)[0])

    def draws(self, count: int) -> Tensor:
        """Return float64 [count] in [0, 1) on the host: the draws of the tokens that follow, until they are spent."""
        while len(self._draws) < count:
            # Always as many at a time: how many are asked for must not change which ones they are.
            further = torch.rand(DRAWS, dtype=torch.float64, device="cpu", generator=self._generator)
            self._draws = torch.cat([self._draws, further])
        return self._draws[:count]

    def spend(self) -> None:
        """Note that the next token has been chosen, by the first of its draws if it takes any."""
        self._draws = self._draws[1:]


def drawn(logits: Tensor, argmax_tokens: Tensor, limits: Tensor, uniform: Tensor) -> Tensor:
    """Return what `Sampler.choose` does for each row of logits [R, vocab], in one shape whatever the settings are.

    argmax_tokens: `greedy(logits)`, which rows of temperature 0 take. limits: float64 [3, R], `Sampler.limits` of each.
    uniform: float64 [R], its draw.
    """
    temperature, top_k, top_p = limits.unbind()
    x = logits.nan_to_num() + 0.0  # a sort may order by bits, where -0.0 is less than 0.0
    is_ranked = (top_k < float("inf")) | (top_p < 1)
    by_rank, tokens = x.sort(dim=1, descending=True, stable=True)
    mass = _masses(torch.where(is_ranked[:, None], by_rank, x), temperature)
    rank = torch.arange(x.shape[1], device=x.device)
    place = _draw(mass * (rank < top_k[:, None]), top_p, uniform)
    token = torch.where(is_ranked, tokens.gather(1, place[:, None])[:, 0], place)
    return torch.where((temperature > 0) & (argmax_tokens >= 0), token, argmax_tokens)


def _candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the scores that can be drawn and their tokens, the most probable first and the lower id on ties.

    All are returned as they stand where their order does not matter. The whole vocabulary is sorted for top-p without
    top-k only.
    """
    if sampling.top_k == 0 and sampling.top_p == 1:
        return scores, torch.arange(len(scores), device=scores.device)
    if sampling.top_k == 0:
        return (scores + 0.0).sort(descending=True, stable=True)
    # As integers float32 numbers keep their order; with the ids behind them there are no ties. -0.0 becomes 0.0.
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(len(scores), device=scores.device)
    keys = (ordered << 32) | (0xFFFFFFFF - ids)
    tokens = 0xFFFFFFFF - (keys.topk(min(sampling.top_k, len(scores))).values & 0xFFFFFFFF)
    return scores.gather(0, tokens), tokens


def _masses(scores: Tensor, temperature: Tensor) -> Tensor:
    """Return probabilities [R, n] of scores [R, n] as whole numbers, the most probable one's 2⁴⁰.

    Whole numbers add up to the same sum in any order, so a draw does not depend on how a device adds.
    """
    limits = torch.finfo(torch.float32)
    steps = temperature.float().clamp(limits.tiny, limits.max)
    return (((scores - scores.amax(1, keepdim=True)) / steps[:, None]).exp() * 2.0**40).long()


def _draw(mass: Tensor, top_p: Tensor | None, uniform: Tensor) -> Tensor:
    """Return where in each row of masses [R, n], falling ones where top_p < 1, its draw [R] in [0, 1) lies.

    top_p: [R], or None if it is 1 for all.
    """
    ends = mass.cumsum(1)
    kept = ends[:, -1]
    if top_p is not None:
        kept = (ends * (ends - mass < top_p[:, None] * kept[:, None])).amax(1)
    drawn = torch.minimum((uniform * kept).long(), kept - 1)
    return torch.searchsorted(ends, drawn[:, None], right=True)[:, 0]
