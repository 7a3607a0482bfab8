"""Triton's kernels in its interpreter, on the CPU: `TRITON_INTERPRET=1 python -m pytest tests/triton`.

The interpreter is chosen when triton is imported, and nothing compiles in its process, so these tests have a process of
their own (`make test` starts it).
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
    "ignore:All-NaN slice encountered:RuntimeWarning:triton",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


PROBLEM = problem()
if PROBLEM is None:
    from tests.triton import bf16_interpreter

    bf16_interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One visible skip per test where nothing can be interpreted; an error where that is required."""
    for item in items:
        # The launch tests and the other files keep float16 in make test; here it is a third of the time.
        if item.path.name == "test_append_visual_kv_triton.py" and "float16" in item.name.split("[")[-1].split("-"):
            item.add_marker(pytest.mark.slow)
    last = [item for item in items if item.path.name == "test_every_kernel.py"]
    items[:] = [item for item in items if item not in last]
    # What a part of the tests leaves out says nothing about all of them.
    if not config.option.keyword and not any(".py" in argument for argument in config.args):
        items += last
    here = [item for item in items if "tests/triton" in item.path.as_posix()]
    if PROBLEM is not None and here:
        if INTERPRETED and "triton" in REQUIRED:
            raise pytest.UsageError(f"VPT_REQUIRE names triton, but {PROBLEM}")
        for item in here:
            item.add_marker(pytest.mark.skip(reason=PROBLEM))
