"""A further turn of a live chat against the whole conversation again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads
from bench.cases import Case, chat
from bench.suite.conftest import DEVICE
from bench.timers import clock

pytestmark = pytest.mark.benchmark(timer=clock(DEVICE), disable_gc=True)


@pytest.mark.parametrize("workload", workloads.CHAT_TURNS, ids=lambda w: w.shape)
def test_turns(workload: workloads.ChatTurn, record: Callable[[Case], None]) -> None:
    record(chat.build(workload, DEVICE))
