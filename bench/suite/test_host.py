"""Host time per call of the smallest calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bench.cases import Case, host
from bench.suite.conftest import DEVICE

pytestmark = pytest.mark.benchmark(timer=time.perf_counter, disable_gc=True)


@pytest.mark.parametrize("name", host.MAKERS)
def test_host(name: str, record: Callable[[Case], None]) -> None:
    record(host.build(name, DEVICE))
