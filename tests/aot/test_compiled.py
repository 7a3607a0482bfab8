"""Triton kernels compiled for sm_80, sm_90, sm_100 and sm_120: registers, spills, shared memory, instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers import INTERPRETED, require

if importlib.util.find_spec("triton.language") is None:
    require("triton", "triton is not installed: pip install triton==3.6.0")
elif INTERPRETED:
    require("triton", "TRITON_INTERPRET=1 is set, and an interpreting process compiles nothing")

from tests.aot.budgets import BUDGETS, limits
from tests.aot.enumeration import launches
from tests.aot.variant import TARGETS, TENSOR_CORES
from tests.aot.variants import VARIANTS

SHARED = {80: 163, 90: 227, 100: 227, 120: 99}
"""KB of shared memory that one block may have."""

ROOT = Path(__file__).resolve().parents[2]
EACH = [(variant, target) for variant in VARIANTS for target in TARGETS]
each_compilation = pytest.mark.parametrize("variant, target", EACH, ids=[f"{v.name} sm_{t}" for v, t in EACH])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The results, from a process of their own."""
    out = tmp_path_factory.mktemp("aot") / "compiled.json"
    command = [sys.executable, "-m", "tests.aot.compile", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@each_compilation
def test_resources(compiled, variant, target):
    found = compiled[variant.name][str(target)]
    assert "error" not in found, found
    registers, shared, spilled = limits(metadata.version("triton"), variant)
    assert found["registers"] <= registers, found
    assert found["shared"] <= shared, found
    assert found["spilled"] <= spilled, found
    assert found["shared"] <= SHARED[target] * 1024, f"sm_{target} cannot launch this"


@each_compilation
def test_instructions(compiled, variant, target):
    """16-bit products run on the tensor cores of the target's own kind; float32 ones, and all else, on none."""
    found = compiled[variant.name][str(target)]
    expected = {TENSOR_CORES[target]} if variant.tensor_cores else set()
    expected |= {"mma.sync"} if variant.batched else set()
    assert found["matrix"] == sorted(expected), found


@each_compilation
def test_contraction(compiled, variant, target):
    """Where a·b + c must round twice, for coefficients or for bit-exact rotations, no fused instruction is left."""
    if not variant.options["enable_fp_fusion"] and not variant.multiplies:
        assert not compiled[variant.name][str(target)]["contracted"]


@each_compilation
def test_double_precision(compiled, variant, target):
    """Coefficients are made in float64 once per axis: what resamples reads them. (One launch has no table to read.)"""
    assert compiled[variant.name][str(target)]["double"] == (
        variant.kernel.__name__ in ("table_kernel", "strip_kernel")
    )


@each_compilation
def test_dependent_launch(compiled, variant, target):
    """Where a kernel waits for the one before it, it does so from sm_90 on, where the hardware can."""
    constants = variant.constants
    chained = "PDL" in constants and constants.get("CONDITIONED", True)
    assert compiled[variant.name][str(target)]["waits"] == (chained and target >= 90)


@each_compilation
def test_streams(compiled, variant, target):
    """Weights and keys are read by 16 bytes a thread."""
    if variant.streams:
        assert compiled[variant.name][str(target)]["wide"]


def test_at_most_three_configurations():
    """Per kernel: the launch tables are short enough to read, and nothing is tuned while it runs."""
    for kernel in {variant.kernel.__name__ for variant in VARIANTS}:
        shapes = set()
        for variant in VARIANTS:
            if variant.kernel.__name__ == kernel:
                blocks = tuple(value for name, value in variant.constants.items() if name in variant.tuned)
                shapes.add((blocks, variant.num_warps, variant.num_stages))
        assert len(shapes) <= 3, (kernel, shapes)


@pytest.mark.parametrize("kernel", sorted({variant.kernel.__name__ for variant in VARIANTS}))
def test_every_launch_says_whether_products_and_sums_are_contracted(kernel):
    """Triton 3.10 changes what it does unasked; what is compiled here is what is launched."""
    asked = {variant.options["enable_fp_fusion"] for variant in VARIANTS if variant.kernel.__name__ == kernel}
    said = launches(kernel)
    assert said, f"no launch of {kernel} was found"
    for place, options in said:
        assert {options.get("enable_fp_fusion")} == asked, place


def test_budgets_are_of_variants_and_have_reasons():
    names = {variant.name for variant in VARIANTS}
    for version, budgets in BUDGETS.items():
        assert budgets.keys() <= names, version
        assert all(budget.reason and any(limit is not None for limit in budget[1:]) for budget in budgets.values())
    variant = next(variant for variant in VARIANTS if variant.name == "project many bf16")
    assert limits("3.6.0", variant) == (variant.registers, variant.shared, 0)
    assert limits("3.8.1", variant)[0] == 255 and limits("3.10.0", variant) == limits("3.9.0", variant)
