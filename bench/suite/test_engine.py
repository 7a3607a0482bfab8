"""What takes seconds, on the CPU: second looks end to end, and decoding by a patched model of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bench import workloads
from bench.cases import Case, engine, patch

pytestmark = pytest.mark.benchmark(timer=time.perf_counter, disable_gc=True)


@pytest.mark.parametrize("workload", workloads.ENGINE, ids=lambda w: w.shape)
def test_engine(workload: workloads.SecondLook, record: Callable[[Case], None]) -> None:
    record(engine.build(workload, "cpu"))


@pytest.mark.parametrize("workload", workloads.DROP_IN_DECODE, ids=lambda w: w.shape)
def test_decode(workload: workloads.DropInDecode, record: Callable[[Case], None]) -> None:
    record(patch.build_decode(workload, "cpu"))
