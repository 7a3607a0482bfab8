"""Nothing that runs on a GPU is left without evidence."""

from __future__ import annotations

import importlib.util

import pytest

from tests.aot.enumeration import EXEMPT, jit_functions, reached
from tests.helpers import INTERPRETED, require

if importlib.util.find_spec("triton.language") is None:
    require("triton", "triton is not installed: pip install triton==3.6.0")
elif INTERPRETED:
    require("triton", "TRITON_INTERPRET=1 is set, and an interpreting process compiles nothing")

from tests.aot.variants import VARIANTS


@pytest.mark.parametrize("name", jit_functions())
def test_every_triton_function_is_compiled(name):
    """As a kernel of `tests.aot.variants`, or inside one. That each is interpreted is checked in `tests/triton`."""
    assert name in EXEMPT or name in reached({variant.kernel.__name__ for variant in VARIANTS})


def test_the_reader_of_sources_works():
    assert {"append_kernel", "float8_bits", "project_kernel", "condition_kernel"} <= set(jit_functions())
    assert "float8_bits" in reached({"append_kernel"}) and "project_kernel" not in reached({"append_kernel"})


def test_exemptions_are_of_something():
    assert set(EXEMPT) <= set(jit_functions()) and all(EXEMPT.values())


@pytest.mark.parametrize(
    "kernel, name", [("table_kernel", "count"), ("resample_kernel", "count"), ("embed_kernel", "rows")]
)
def test_numbers_that_change_from_look_to_look_are_not_specialised(kernel, name):
    """A count that happens to be 1 or a multiple of 16 would compile anew, inside that look."""
    from vpt_kernels.roi_patch_embed import triton

    (parameter,) = [p for p in getattr(triton, kernel).params if p.name == name]
    assert parameter.do_not_specialize
