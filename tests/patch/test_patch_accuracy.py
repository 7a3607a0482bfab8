"""A patched model errs, against float64, at most twice as much as the unpatched one of the same dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import normal
from tests.patch import foreign, published
from tests.patch.published import FEATURES, GRID
from vpt_kernels import patch

Run = Callable[[nn.Module], Tensor]
DRAWS = 48


def language(kind: str) -> tuple[nn.Module, Run]:
    """The logits of a padded batch of three images."""
    model = foreign.qwen(kind)
    given = foreign.prompt(model, foreign.PADDED).inputs
    return model, lambda other: other(**given).logits[given["attention_mask"].bool()]


def encoder(kind: str) -> tuple[nn.Module, Run]:
    model, size = (foreign.dinov2(), 56) if kind == "dinov2" else (foreign.sam(), 64)
    pixels = normal(2, 3, size, size, key=("accuracy", kind))
    return model, lambda other: other(pixels.to(next(other.parameters()).dtype)).last_hidden_state


def projector(kind: str) -> tuple[nn.Module, Run]:
    model = foreign.filled(published.PROJECTORS[kind]())
    grids = {"grid_thw": GRID} if kind == "clip" else {}

    def run(other: nn.Module) -> Tensor:
        dtype = other.linear_condition.weight.dtype
        results = []
        # A token's error is mostly that of one score: a call of a few tokens says little.
        for draw in range(DRAWS):
            features = normal(*FEATURES[kind], key=("accuracy", kind, draw))
            control = normal(3, published.HIDDEN, key=("accuracy", draw))
            results.append(other(features.to(dtype), control.to(dtype), **grids)[0].flatten(0, -2))
        return torch.cat(results)

    return model, run


CASES = {**dict.fromkeys(foreign.QWEN, language), "dinov2": encoder, "sam": encoder}
CASES |= dict.fromkeys(published.PROJECTORS, projector)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@torch.no_grad()
def test_a_patched_model_is_as_exact(kind: str, dtype: torch.dtype) -> None:
    """16 bits: the largest error counts; float32: the root mean square, and no single error tenfold."""
    model, run = CASES[kind](kind)
    exact, narrow = run(copy.deepcopy(model).double()), copy.deepcopy(model).to(dtype)
    before = (run(narrow).double() - exact).abs()
    with patch(narrow) as report:
        after = (run(narrow).double() - exact).abs()
    assert report.calls and not any(way.startswith("original") for way in report.calls)
    assert 0 < after.max() and before.max() < 0.3 * exact.std()
    if dtype == torch.float32:
        assert after.square().mean() <= 4 * before.square().mean() and after.max() <= 10 * before.max()
    else:
        assert after.max() <= 2 * before.max()
