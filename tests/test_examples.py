"""The worked examples run, and what they claim about other libraries' calls is so."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def continued() -> dict[str, float | str]:
    example = runpy.run_path(str(EXAMPLES / "continue_cache.py"))
    return example["outcomes"](example["TINY"]["model"](), example["TINY"]["processor"]())


@pytest.mark.parametrize(
    "form, outcome",
    [
        ("all ids, the new image and grid", "wrong or StopIteration"),  # the latter from transformers 5.24 on
        ("all ids, all images and grids", "ValueError"),
        ("all ids, the new image, all grids", "RuntimeError"),
        ("new ids, the new image, a mask of everything", "wrong"),
        ("new ids, the new image, no mask", "ValueError"),
        ("all ids, the new image and grid, explicit position_ids", "right"),
        ("LiveConversation, dynamic cache", "right"),
        ("LiveConversation, static cache", "right"),
    ],
)
def test_continuing_a_cache(continued, form: str, outcome: str) -> None:
    found = continued[form]
    if outcome == "right":
        assert found < 1e-4
    elif isinstance(found, str):
        assert found.partition(":")[0] in outcome.split(" or ")
    else:
        assert outcome.startswith("wrong") and found > 0.1


def test_every_way_is_checked(continued) -> None:
    assert len(continued) == 8


def test_zooming_feeds_every_token_once():
    answer = runpy.run_path(str(EXAMPLES / "zoom.py"))["random_run"]()
    assert answer.boxes == [(0, 28, 14, 112, 98), (0, 5, 6, 40, 60)] and answer.text == "7 7"
    chat = answer.conversation
    assert chat.fed["tokens"] == chat.length == len(chat.ids) - 1 and len(chat.images) == 3
