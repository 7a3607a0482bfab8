"""What takes seconds: second looks from the trigger to the first answer token, and decoded tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from bench import workloads
from bench.cases import Case, decode, engine, patch
from bench.suite.conftest import DEVICE

pytestmark = pytest.mark.benchmark(timer=time.perf_counter, disable_gc=True)


@pytest.mark.parametrize("workload", workloads.ENGINE[DEVICE], ids=lambda w: w.shape)
def test_engine(
    workload: workloads.SecondLook | workloads.Decode, weights: str, record: Callable[[Case], None]
) -> None:
    case = decode if isinstance(workload, workloads.Decode) else engine
    record(case.build(replace(workload, weights=weights), DEVICE))


@pytest.mark.parametrize("workload", workloads.DROP_IN_DECODE, ids=lambda w: w.shape)
def test_decode(workload: workloads.DropInDecode, record: Callable[[Case], None]) -> None:
    record(patch.build_decode(workload, "cpu"))
