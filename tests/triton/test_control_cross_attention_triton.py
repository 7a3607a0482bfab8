"""The tests of `control_cross_attention`, on Triton's kernels in blocks large enough for the interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.test_control_cross_attention import *  # noqa: F403


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter milliseconds whatever its size; the shipped blocks have a test of their own."""
    from vpt_kernels.control_cross_attention import triton

    monkeypatch.setattr(triton, "GEMM_LAUNCHES", dict.fromkeys(triton.GEMM_LAUNCHES, (256, 512, 256, 4, 1)))
    monkeypatch.setattr(triton, "CONDITION_LAUNCHES", {"one image": (1, 512, 512, 4), "images": (4, 512, 256, 4)})
    monkeypatch.setattr(triton, "IDENTITY_LAUNCHES", {"narrow": (2048, 64, 4), "wide": (16384, 64, 8)})
