from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import SEED
from tests.model.watch import Reads
from vpt_model.engine.sampling import Sampler, Sampling, _candidates, drawn, greedy


def logits(count: int, vocab: int = 200) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(SEED)) * 3


def probabilities(row: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """transformers' chain of the published evaluation."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, row[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (2.0, 30, 0.6)])
def test_draws_follow_the_distribution_of_transformers(temperature, top_k, top_p):
    (row,) = logits(1)
    sampler, draws = Sampler(Sampling(temperature, top_k, top_p, seed=SEED)), 4000
    counts = Counter(sampler(row) for _ in range(draws))
    expected = probabilities(row, temperature, top_k, top_p)
    assert {token for token, p in enumerate(expected.tolist()) if p == 0}.isdisjoint(counts)
    for token, p in enumerate(expected.tolist()):
        # Six standard deviations: about one false alarm in a million runs.
        assert abs(counts[token] - draws * p) <= 6 * (draws * p * (1 - p)) ** 0.5 + 3


def test_the_published_settings_are_greedy():
    sampler, greedy = Sampler(Sampling(temperature=0.95, top_k=10, top_p=0.1)), Sampler()
    for row in logits(500, 2000):
        assert sampler(row) == greedy(row) == int(row.argmax())


def test_the_lowest_id_wins_ties():
    row = torch.tensor([0.0, 5.0, 5.0, 5.0, 1.0])
    for sampling in (Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(0.95, 10, 0.1)):
        assert Sampler(sampling)(row) == 1


def test_seeds_decide():
    rows = logits(40)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler(row) for row in rows]

    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(1e-30, 3, 0.5)])
def test_broken_logits(sampling):
    """NaN is not chosen over, it is told; infinities are numbers that are too large."""
    nan, infinity = float("nan"), float("inf")
    for row in ([-1.0, nan, 3.0e4, -infinity], [1.0, infinity, nan], [nan, nan]):
        assert Sampler(sampling)(torch.tensor(row)) is None
    assert Sampler(sampling)(torch.tensor([1.0, infinity, -infinity])) == 1


@pytest.mark.parametrize("temperature", (3.4e38, 1e39, sys.float_info.max))
def test_a_temperature_beyond_float32(temperature):
    """It counts as the largest one, in both ways to draw."""
    row, sampler = torch.tensor([0.0, float("inf"), float("-inf"), 1.0]), Sampler(Sampling(temperature))
    assert {sampler(row) for _ in range(60)} == {0, 1, 3}
    apart = torch.tensor([[3.4e38, -3.4e38] * 150])
    for seed in range(20):
        given = Sampler(Sampling(temperature, top_k=299, seed=seed))
        draw, known = given.draws(1), torch.tensor(given.limits, dtype=torch.float64)[:, None]
        assert drawn(apart, greedy(apart), known, draw).tolist() == [given(apart[0])]


def test_greedy_of_several_rows():
    nan = float("nan")
    assert greedy(torch.tensor([[0.0, 2.0, 2.0], [5.0, nan, 7.0], [3.0, 1.0, 3.0]])).tolist() == [1, -1, 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 20, 0.8, seed=4)])
def test_one_number_is_read_per_token(sampling):
    """On a GPU every read is a wait, and so is every shape that depends on values."""
    sampler, (row,) = Sampler(sampling), logits(1)
    with Reads() as reads:
        sampler(row)
    assert reads.names == ["_local_scalar_dense"]


class Operators(TorchDispatchMode):
    """Names and sizes of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        size = args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0
        self.seen.append((function.overloadpacket.__name__, size))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [Sampling(0.9, 20, 0.8), Sampling(1.0, 1), Sampling(0.7)])
def test_the_vocabulary_is_not_sorted(sampling):
    """On a GPU that is many launches over every token; after top-k only k numbers are left to draw from."""
    (row,) = logits(1, 5000)
    with Operators() as operators:
        Sampler(sampling)(row)
    assert not [name for name, _ in operators.seen if name == "sort"]
    assert not sampling.top_k or ("cumsum", sampling.top_k) in operators.seen


@pytest.mark.parametrize("k", [1, 3, 7, 50, 64])
def test_top_k_keeps_what_a_stable_sort_would(k):
    """Ties, zeros of both signs, negative and extreme numbers; the lower id first."""
    pool = torch.tensor([0.0, -0.0, 1.5, -1.5, 3e38, -3e38, 1e-40, 2.0])
    scores = pool[torch.randint(0, len(pool), (64,), generator=torch.Generator().manual_seed(SEED))]
    values, tokens = scores.sort(descending=True, stable=True)
    found = _candidates(scores, Sampling(1.0, top_k=k))
    assert torch.equal(found[1], tokens[:k]) and torch.equal(found[0], values[:k])


def test_rows_that_are_drawn_together():
    """Whatever each one's settings are: the sampler's own tokens. Ties, both zeros, infinities, NaN; padding."""
    generator, settings = torch.Generator().manual_seed(SEED), []
    for number in range(400):
        temperature = [0.0, 1e-30, 0.3, 1.0, 3.0][number % 5]
        top_k, top_p = [0, 1, 7, 60, 61, 500][number % 6], [1.0, 0.9, 0.5, 0.1, 1e-6][number % 7 % 5]
        settings.append(Sampling(temperature, top_k, top_p, seed=SEED % 1000 + number))
    rows = torch.randn(len(settings), 60, generator=generator) * 4
    rows[::2] = (rows[::2] * 2).round() / 2
    rows[5::50], rows[6::50, 3], rows[7::50, 9] = -0.0, float("inf"), float("-inf")
    rows[8::50, torch.randint(0, 60, (1,), generator=generator)] = float("nan")
    samplers = [Sampler(one) for one in settings]
    limits = torch.tensor([sampler.limits for sampler in samplers], dtype=torch.float64).T
    for _ in range(3):
        draws = torch.cat([sampler.draws(1) for sampler in samplers])
        found = drawn(rows, greedy(rows), limits, draws).tolist()
        assert found == [-1 if (token := sampler(row)) is None else token for sampler, row in zip(samplers, rows)]
    assert len(set(found)) > 20 and found.count(-1) == 8


def test_draws_at_the_ends_of_their_range():
    """The first token that can be drawn, and the last one; a token without a probability never is."""
    row = torch.tensor([[-200.0, 0.0, -200.0, 1.0, 0.5, -200.0]])
    for top_k, expected in ((float("inf"), (1, 4)), (2.0, (3, 4))):
        for draw, token in zip((0.0, 1 - 2.0**-53), expected):
            limits, uniform = (torch.tensor(x, dtype=torch.float64) for x in ([[1.0], [top_k], [1.0]], [draw]))
            assert drawn(row, greedy(row), limits, uniform).tolist() == [token]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 10**400}, "temperature is an integer of 1329 bits"),
        ({"temperature": -(10**5000)}, "temperature is an integer of"),
        ({"top_p": 10**5000}, "top_p is an integer of"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
