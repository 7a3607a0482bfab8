"""The worked examples run, and what they claim about other libraries' calls is so."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def continued() -> dict[str, float | str]:
    example = runpy.run_path(str(EXAMPLES / "continue_cache.py"))
    return example["outcomes"](example["tiny_model"]())


@pytest.mark.parametrize("form, outcome", [
    ("all ids, the new image and grid", "wrong"),
    ("all ids, all images and grids", "ValueError"),
    ("all ids, the new image, all grids", "RuntimeError"),
    ("new ids, the new image, a mask of everything", "wrong"),
    ("new ids, the new image, no mask", "ValueError"),
    ("all ids, the new image and grid, explicit position_ids", "right"),
    ("appended with explicit positions, DynamicCache", "right"),
    ("appended with explicit positions, StaticCache", "right"),
])  # fmt: skip
def test_continuing_a_cache(continued, form: str, outcome: str) -> None:
    found = continued[form]
    if outcome == "right":
        assert found < 1e-4
    elif outcome == "wrong":
        assert found > 0.1
    else:
        assert found.startswith(f"{outcome}: ")


def test_every_way_is_checked(continued) -> None:
    assert len(continued) == 8
