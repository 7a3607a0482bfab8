"""The tests of `append_visual_kv`, on Triton's kernel in blocks large enough for the interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.test_append_formats import *  # noqa: F403
from tests.kernels.test_append_layouts import *  # noqa: F403
from tests.kernels.test_append_variants import *  # noqa: F403
from tests.kernels.test_append_visual_kv import *  # noqa: F403


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter milliseconds whatever its size; the shipped blocks have a test of their own."""
    from vpt_kernels.append_visual_kv import triton

    monkeypatch.setattr(triton, "LAUNCHES", ((None, 64, 1),))
    monkeypatch.setattr(triton, "BLOCK_HEADS", 4)
