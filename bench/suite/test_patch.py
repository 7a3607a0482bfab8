"""transformers' image processor and patch embedding with the kernels in place against themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads
from bench.cases import Case, patch
from bench.suite.conftest import DEVICE
from bench.timers import clock

pytestmark = pytest.mark.benchmark(timer=clock(DEVICE), disable_gc=True)


@pytest.mark.parametrize("workload", workloads.DROP_IN_IMAGES, ids=lambda w: w.shape)
def test_images(workload: workloads.DropInImage, record: Callable[[Case], None]) -> None:
    record(patch.build_image(workload, DEVICE))
