"""The CUDA backend's host code and kernels, executed on the CPU: by the operators' own tests and by `executed.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cuda.on_cpu import ROOT

SUITES = {
    # name: files, what runs in every test run (all of it in the slow one), what does not apply
    "own": ("tests/cuda/executed.py", "", ""),
    "append": (
        "tests/kernels/test_append_visual_kv.py tests/kernels/test_append_layouts.py "
        "tests/kernels/test_append_formats.py tests/kernels/test_append_variants.py "
        "tests/kernels/test_append_norm.py tests/kernels/test_overlap.py",
        "not float16",
        "",
    ),
    "append errors": ("tests/kernels/test_append_bad_input.py", "", "position or negative"),
    "control": (
        "tests/kernels/test_control_cross_attention.py tests/kernels/test_control_bad_input.py",
        "not 3584 and not 1536",
        "linear or conv or odd_widths or large_scores or means_far",
    ),
    "pixels": (
        "tests/kernels/test_roi_patches.py tests/kernels/test_pass_order.py tests/kernels/test_roi_bad_input.py",
        "not (random_geometries or very_large or (nearest_chain and (224 or 512)))"
        " or (random_geometries and hv and (tall or border))",
        "",
    ),
    "tokens": (
        "tests/kernels/test_roi_patch_embed.py tests/kernels/test_folded_weight.py",
        "(changes or into or padded_patch or patch_sizes or widths or sam_tokens_with_padding) and not float16",
        "",
    ),
}


def run(name: str, chosen: str) -> None:
    """Run a suite in a process of its own, where backend="cuda" is the CPU build."""
    files, _, without = SUITES[name]
    wanted = " and ".join(f"({part})" for part in (chosen, f"not ({without})" if without else "") if part)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "tests.cuda.on_cpu"]
    command += ["--tb=short", *files.split(), "-m", "not gpu", *(["-k", wanted] if wanted else [])]
    environment = {**os.environ, "VPT_TEST_BACKENDS": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in last[0] and "skipped" not in last[0], last[0]


@pytest.mark.parametrize("name", SUITES)
def test_suite(name):
    run(name, SUITES[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, suite in SUITES.items() if suite[1]])
def test_whole_suite(name):
    run(name, "")
