"""The operators against their strongest alternatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads
from bench.cases import Case, append, control, linear, roi
from bench.suite.conftest import DEVICE
from bench.timers import clock

pytestmark = pytest.mark.benchmark(timer=clock(DEVICE), disable_gc=True)


@pytest.mark.parametrize("workload", workloads.ROI, ids=lambda w: f"{w.shape}, {w.dtype}")
def test_roi_patch_embed(workload: workloads.Roi, record: Callable[[Case], None]) -> None:
    record(roi.build(workload, DEVICE))


@pytest.mark.parametrize("workload", workloads.PATCHES, ids=lambda w: w.shape)
def test_roi_patches(workload: workloads.Roi, record: Callable[[Case], None]) -> None:
    record(roi.build_patches(workload, DEVICE))


@pytest.mark.parametrize("workload", workloads.CONTROL, ids=lambda w: f"{w.shape}, {w.dtype}")
def test_control_cross_attention(workload: workloads.Control, record: Callable[[Case], None]) -> None:
    record(control.build(workload, DEVICE))


@pytest.mark.parametrize("workload", workloads.APPEND, ids=lambda w: f"{w.shape}, {w.dtype}")
def test_append_visual_kv(workload: workloads.Append, record: Callable[[Case], None]) -> None:
    record(append.build(workload, DEVICE))


@pytest.mark.parametrize("workload", workloads.PRODUCTS[DEVICE], ids=lambda w: w.shape)
def test_packed_linear(workload: workloads.Product, record: Callable[[Case], None]) -> None:
    record(linear.build(workload, DEVICE))
