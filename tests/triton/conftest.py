"""Triton's kernels in its interpreter, on the CPU: `TRITON_INTERPRET=1 python -m pytest tests/kernels tests/triton`."""

from __future__ import annotations

import pytest

from tests.triton import interpreter


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    last = [item for item in items if item.path.name == "test_every_kernel.py"]
    items[:] = [item for item in items if item not in last]
    # What a part of the tests leaves out says nothing about all of them.
    if not config.option.keyword and not any(".py" in argument for argument in config.args):
        items += last
    interpreter.skip([item for item in items if "tests/triton" in item.path.as_posix()])
