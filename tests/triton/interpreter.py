"""Triton's interpreter in this process: whether it can be used, and how it is made to compute bfloat16 by value.

The interpreter is chosen when triton is imported, and nothing compiles in its process, so its tests have a process of
their own: `make interpret`.
"""

from __future__ import annotations

import importlib.metadata

import pytest

from tests.helpers import INTERPRETED, REQUIRED


def problem() -> str | None:
    """Why kernels cannot be interpreted in this process, or None."""
    if not INTERPRETED:
        return "TRITON_INTERPRET=1 must be set before Python starts (make test does)"
    try:
        versions = {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    except importlib.metadata.PackageNotFoundError as missing:
        return f"{missing.name} is not installed: pip install triton==3.6.0 'numpy<2.4'"
    if versions["triton"].startswith("3.6.") and tuple(map(int, versions["numpy"].split(".")[:2])) >= (2, 4):
        return f"triton {versions['triton']} interprets with numpy < 2.4 only, this is {versions['numpy']}"
    return None


# The interpreter's own use of numpy; what matters of it would be an error or a wrong result.
WARNINGS = (
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton",
    "ignore:invalid value encountered:RuntimeWarning:triton",
    "ignore:overflow encountered:RuntimeWarning:triton",
    "ignore:divide by zero encountered:RuntimeWarning:triton",
    "ignore:All-NaN slice encountered:RuntimeWarning:triton",
)

PROBLEM = problem()
if PROBLEM is None:
    from tests.triton import bf16_interpreter

    bf16_interpreter.install()


def skip(items: list[pytest.Item]) -> None:
    """One visible skip per test where nothing can be interpreted; an error where that is required."""
    if PROBLEM is None or not items:
        return
    if INTERPRETED and "triton" in REQUIRED:
        raise pytest.UsageError(f"VPT_REQUIRE names triton, but {PROBLEM}")
    for item in items:
        item.add_marker(pytest.mark.skip(reason=PROBLEM))
