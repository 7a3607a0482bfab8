"""The tests of `append_visual_kv`, on Triton's kernel in blocks large enough for the interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.test_append_formats import *  # noqa: F403
from tests.kernels.test_append_layouts import *  # noqa: F403
from tests.kernels.test_append_variants import *  # noqa: F403
from tests.kernels.test_append_visual_kv import *  # noqa: F403
from vpt_kernels.append_visual_kv import triton


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter milliseconds whatever its size; the shipped blocks have tests of their own."""
    monkeypatch.setattr(triton, "LAUNCHES", dict.fromkeys(triton.LAUNCHES, (64, 1)))


# These are about no backend, and tests/kernels runs them.
del test_rotary_table_is_transformers, test_rotary_table_of_one_position_and_other_theta  # noqa: F821
