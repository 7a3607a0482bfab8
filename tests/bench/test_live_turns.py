"""What a further turn with a model of transformers costs does not depend on what came before it."""

from __future__ import annotations

import pytest

from bench.cases import WrongResult, live
from bench.workloads import LIVE_TURNS, LiveTurn

PRESET = "2b-slice"
"""The ids are Qwen's own, which no smaller preset has."""


@pytest.mark.slow
@pytest.mark.parametrize("turn", ["question", "image", "zoom"])
def test_the_work_is_independent_of_history(turn):
    news = []
    for behind in (0, 256):
        one = live.Turn(LiveTurn(PRESET, turn, behind), "cpu")
        fed = dict(one.chat.fed)
        one.ours()
        news.append(one.new())
        assert tuple(one.chat.fed[name] - fed[name] for name in ("tokens", "patches")) == news[-1]
    assert news[0] == news[1] and (news[0][1] == 0) == (turn == "question")


@pytest.mark.slow
def test_a_turn_that_feeds_more_is_no_row(monkeypatch):
    case = live.build(LiveTurn(PRESET, "zoom", 0), "cpu")
    case.check()
    monkeypatch.setattr(live.Turn, "new", lambda self: (1, 0))
    with pytest.raises(WrongResult, match="tokens and patches, not the"):
        case.check()


@pytest.mark.slow
def test_rows_are_right():
    case = live.build(LiveTurn(PRESET, "question", 64, sweep="behind"), "cpu")
    assert case.sweep.at == 64 and set(case.timeline()["ours"]) == {"attention", "everything else"}


def test_rows_are_complete():
    asked = {(row.turn, row.behind) for row in LIVE_TURNS}
    assert asked == {(turn, n) for turn in ("question", "image", "zoom") for n in (0, 256, 1024, 4096)}
