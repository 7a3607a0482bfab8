"""A further turn of a live conversation with a model of transformers against generating anew and doing it by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads
from bench.cases import Case, live
from bench.suite.conftest import DEVICE
from bench.timers import clock

pytestmark = pytest.mark.benchmark(timer=clock(DEVICE), disable_gc=True)


@pytest.mark.parametrize("workload", workloads.LIVE_TURNS, ids=lambda w: w.shape)
def test_turns(workload: workloads.LiveTurn, record: Callable[[Case], None]) -> None:
    record(live.build(workload, DEVICE))
