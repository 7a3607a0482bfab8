"""What a further turn of a chat costs does not depend on what came before it."""

from __future__ import annotations

import pytest

from bench.cases import WrongResult, chat
from bench.workloads import CHAT_TURNS, ChatTurn


@pytest.mark.parametrize("turn", ["question", "image", "zoom"])
def test_the_work_is_independent_of_history(turn):
    turns = [chat.Turn(ChatTurn("tiny", turn, behind), "cpu") for behind in (0, 256, 1024)]
    for one in turns:
        one.check_tokens()
    works = [[{k: v for k, v in stage.work.items()} for stage in one.answer.timings if stage.work] for one in turns]
    assert works[0] == works[1] == works[2]
    assert [one.before - turns[0].before for one in turns] == [0, 256, 1024]


def test_a_turn_that_feeds_more_is_no_row():
    turn = chat.Turn(ChatTurn("tiny", "question", 0), "cpu")
    turn.before += 1
    with pytest.raises(WrongResult, match="tokens and 0 pictures"):
        turn.check_tokens()


def test_rows_are_right_and_complete():
    case = chat.build(ChatTurn("tiny", "zoom", 64), "cpu")
    case.check()
    stages, apart = case.timeline().values()
    assert set(stages) >= {"crop+embed", "ViT", "append"}
    assert apart["attention"] > 0 and apart["everything else"] > 0
    asked = {(row.turn, row.behind) for row in CHAT_TURNS}
    assert asked == {(turn, n) for turn in ("question", "image", "zoom") for n in (0, 256, 1024, 4096)}
