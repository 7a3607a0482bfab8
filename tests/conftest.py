"""The random seed in pytest's header, poisoned memory in every test, and the mark of long cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import durations
from tests.helpers import INTERPRETED, SEED


def pytest_report_header() -> str:
    return f"VPT_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that torch.empty returns, in Python and in C++, is NaN (integers: their maximum) until it is written.

    A test marked `unpoisoned` opts out: torch.compile would otherwise build its deterministic variants.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in durations.long(items, durations.MODES[INTERPRETED]):
        item.add_marker(pytest.mark.long)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: uninitialised memory is left as the allocator returns it")
    if INTERPRETED:
        from tests.triton import interpreter

        for line in interpreter.WARNINGS:
            config.addinivalue_line("filterwarnings", line)
