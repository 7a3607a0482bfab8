"""VPT_KERNELS_CHECK=1 raises for index values that are otherwise skipped or undefined."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import BACKENDS, each_backend

ROOT = Path(__file__).resolve().parents[2]
INT = torch.int64

CASES = {
    # operator, its index tensor, what the message names: the value and the limit
    "slots in order": ("append", {"slots": [0, 1, 2, 3]}, None),
    "skipped slots": ("append", {"slots": [-1, 5, -1, -7]}, None),
    "equal slots": ("append", {"slots": [2, 5, 2, 1]}, ["slots", "twice"]),
    "slot at capacity": ("append", {"slots": [0, 1, 6, 2]}, ["slots", "6"]),
    "slot beyond capacity": ("append", {"slots": [0, 1, 1 << 40, 2]}, ["slots", str(1 << 40), "6"]),
    "last slot of pages": ("append", {"slots": [0, 5, 1, 2], "paged": True}, None),
    "slot beyond the pages": ("append", {"slots": [0, 5, 9, 2], "paged": True}, ["slots", "9", "6"]),
    "rows of HND": ("append", {"slots": [0, 5, 1, 2], "layout": "HND"}, None),
    "slot beyond HND": ("append", {"slots": [0, 6, 1, 2], "layout": "HND"}, ["slots", "6"]),
    "rows in order": ("into", {"rows": [4, 3, 2, 0]}, None),
    "skipped rows": ("into", {"rows": [-1, 3, -1, 0]}, None),
    "equal rows": ("into", {"rows": [1, 3, 3, 0]}, ["rows", "twice"]),
    "row at the end": ("into", {"rows": [1, 3, 5, 0]}, ["rows", "5"]),
    "row beyond the end": ("into", {"rows": [1, 3, 77, 0]}, ["rows", "77", "5"]),
}
ALWAYS = {
    # refused on the CPU with and without the variable
    "position at the end": ("append", {"position": 9}, ["9", "8"]),
    "position below": ("append", {"position": -2}, ["-2", "8"]),
    "cu_seqlens too short": ("project", {"ends": [0, 1, 3]}, ["cu_seqlens", "[0, 1, 3]", "4"]),
    "cu_seqlens too long": ("project", {"ends": [0, 1, 5]}, ["cu_seqlens", "[0, 1, 5]", "4"]),
    "cu_seqlens falls": ("project", {"ends": [0, 5, 4]}, ["cu_seqlens", "[0, 5, 4]", "4"]),
    "cu_seqlens starts late": ("project", {"ends": [1, 2, 4]}, ["cu_seqlens", "[1, 2, 4]", "4"]),
}


def append(backend: str, slots=(0, 1, 2, 3), position: int = 0, paged: bool = False, layout: str = "NHD") -> list:
    """The rows of k_cache and v_cache that were written."""
    from vpt_kernels import append_visual_kv, rotary_table

    shape = (3, 2, 1, 4) if paged else (6, 1, 4) if layout == "NHD" else (1, 6, 4)
    caches = [torch.zeros(shape), torch.zeros(shape)]
    x = torch.ones(4, 1, 4)
    positions = torch.zeros(3, 4, dtype=INT)
    positions[1, 2] = position
    index = torch.tensor(slots)
    append_visual_kv(x, x, x, rotary_table(9, 4), positions, index, *caches, (1, 1, 0), layout=layout, backend=backend)
    return [cache.reshape(6, 4).any(1).nonzero().flatten().tolist() for cache in caches]


def projected(backend: str, rows: list[int] | None, ends: tuple[int, ...]) -> list:
    """The rows of the output that were written."""
    from vpt_kernels import control_cross_attention, control_cross_attention_into, fold_projector

    ones, weight = (torch.ones(4), torch.ones(4)), (torch.eye(4), torch.ones(4))
    projector = fold_projector("identity", condition_norm=ones, condition=weight)
    features, control, ends = torch.ones(4, 4), torch.rand(2, 4), torch.tensor(ends, dtype=torch.int32)
    if rows is None:
        return [len(control_cross_attention(features, control, projector, ends, backend=backend))]
    out = torch.zeros(5, 4)
    control_cross_attention_into(features, control, projector, out, torch.tensor(rows), ends, backend=backend)
    return out.any(1).nonzero().flatten().tolist()


def call(backend: str, operator: str, options: dict) -> list:
    if operator == "append":
        return append(backend, **options)
    return projected(backend, options.get("rows"), tuple(options.get("ends", (0, 1, 4))))


def outcomes() -> dict[str, list]:
    """Of every case on every backend: [what was written, None], or [None, "error: message"]."""
    found = {}
    for name, (operator, options, _) in (CASES | ALWAYS).items():
        for backend in BACKENDS:
            try:
                found[f"{name}/{backend}"] = [call(backend, operator, options), None]
            except Exception as error:  # noqa: BLE001  (the test compares its type and text)
                found[f"{name}/{backend}"] = [None, f"{type(error).__name__}: {error}"]
    return found


@pytest.fixture(scope="module")
def results() -> dict[bool, dict[str, list]]:
    """Outcomes in a process with the variable set, and in one without."""
    found = {}
    for checked in (True, False):
        environment = {name: value for name, value in os.environ.items() if name != "VPT_KERNELS_CHECK"}
        if checked:
            environment["VPT_KERNELS_CHECK"] = "1"
        command = [
            sys.executable,
            "-c",
            "import json; from tests.kernels import test_check_mode as t; print(json.dumps(t.outcomes()))",
        ]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        found[checked] = json.loads(run.stdout.splitlines()[-1])
    return found


def assert_refused(outcome: list, named: list[str]) -> None:
    written, error = outcome
    assert written is None and error.startswith("ValueError: "), outcome
    assert all(text in error for text in named), error
    assert len(error.splitlines()) == 1


@each_backend
@pytest.mark.parametrize("name", CASES)
def test_index_values(results, name, backend):
    operator, options, named = CASES[name]
    outcome = results[True][f"{name}/{backend}"]
    if named is None:
        assert outcome == results[False][f"{name}/{backend}"] and outcome[1] is None
    else:
        assert_refused(outcome, named)


@each_backend
@pytest.mark.parametrize("name", CASES)
def test_without_the_variable_rows_outside_are_skipped(results, name, backend):
    operator, options, _ = CASES[name]
    index, size = (options["slots"], 6) if operator == "append" else (options["rows"], 5)
    inside = sorted({i for i in index if 0 <= i < size})
    assert results[False][f"{name}/{backend}"] == [[inside, inside] if operator == "append" else inside, None]


@each_backend
@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("checked", (True, False), ids=("checked", "unchecked"))
def test_values_refused_either_way(results, name, backend, checked):
    assert_refused(results[checked][f"{name}/{backend}"], ALWAYS[name][2])
