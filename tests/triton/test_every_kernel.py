"""Runs last: what the other tests of this folder have interpreted."""

from __future__ import annotations

import pytest

from tests.aot.enumeration import EXEMPT, jit_functions
from tests.triton.bf16_interpreter import executed


@pytest.mark.parametrize("name", jit_functions())
def test_every_triton_function_was_interpreted(name):
    assert name in EXEMPT or name in executed
