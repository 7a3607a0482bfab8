"""What `packed_linear`'s kernels are handed past its Python: refused where they would read or write out of bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers import assert_same_bits, normal
from tests.kernels.packed_checks import not_interpreted
from vpt_kernels import pack_weight, packed_linear

pytestmark = not_interpreted

N, K, ROWS = 37, 70, 6


def operands(stored: str = "int8", gated: bool = False) -> dict[str, Any]:
    """Of the operator, in the schema's order."""
    packed = pack_weight(normal(2 * N if gated else N, K, key="w"), stored, gated=gated)
    return {
        "x": normal(ROWS, K, key="x"),
        "data": packed.data,
        "scales": packed.scales,
        "minima": packed.minima,
        "features": N,
        "gated": gated,
        "dynamic": packed.dynamic,
        "bias": normal(2 * N if gated else N, key="b"),
        "residual": normal(ROWS, N, key="r"),
        "activation": 1 if gated else 0,
    }


def wide(*shape: int) -> torch.Tensor:
    """Rows whose columns are not adjacent."""
    return normal(*shape[::-1], key="wide").T


BAD = {
    "fewer panels": {"data": operands()["data"][:-1]},
    "more panels": {"data": torch.zeros(4, K // 2, 32, dtype=torch.int8)},
    "narrower panels": {"data": operands()["data"][:, :-1].contiguous()},
    "wider panels": {"data": torch.zeros(3, K // 2 + 1, 32, dtype=torch.int8)},
    "panels of 16": {"data": operands()["data"][..., :16].contiguous()},
    "panels with strides": {"data": torch.zeros(3, 32, K // 2, dtype=torch.int8).transpose(1, 2)},
    "flat panels": {"data": operands()["data"].flatten()},
    "no scales": {"scales": None},
    "scales of fewer panels": {"scales": operands()["scales"][:-1]},
    "scales of two groups": {"scales": torch.ones(3, 2, 16)},
    "scales of 8 rows": {"scales": torch.ones(3, 1, 8)},
    "scales in float64": {"scales": torch.ones(3, 1, 16, dtype=torch.float64)},
    "scales with strides": {"scales": torch.ones(3, 16, 3).transpose(1, 2)[:, :1]},
    "minima beside int8": {"minima": operands("int4")["minima"]},
    "scales beside floats": {"data": pack_weight(normal(N, K, key="w")).data},
    "more features": {"features": N + 16},
    "negative features": {"features": -1},
    "gated": {"gated": True, "activation": 1},
    "bias of one less": {"bias": normal(N - 1, key="b")},
    "bias in bfloat16": {"bias": normal(N, key="b", dtype=torch.bfloat16)},
    "bias with strides": {"bias": normal(2 * N, key="b")[::2]},
    "residual of fewer rows": {"residual": normal(ROWS - 1, N, key="r")},
    "residual of fewer columns": {"residual": normal(ROWS, N - 1, key="r")},
    "residual in bfloat16": {"residual": normal(ROWS, N, key="r", dtype=torch.bfloat16)},
    "residual with strides": {"residual": wide(ROWS, N)},
    "flat residual": {"residual": normal(ROWS * N, key="r")},
    "x of one column more": {"x": normal(ROWS, K + 2, key="x")},
    "x with strides": {"x": wide(ROWS, K)},
    "flat x": {"x": normal(K, key="x")},
    "x in float64": {"x": normal(ROWS, K, key="x").double(), "residual": None},
    "dynamic beside scales of groups": {"scales": torch.ones(3, 3, 16), "dynamic": True},
    "activation 5": {"activation": 5},
    "activation −1": {"activation": -1},
}
BAD_INT4 = {
    "fewer panels": {"data": operands("int4")["data"][:-1]},
    "narrower panels": {"data": operands("int4")["data"][:, :-1].contiguous()},
    "panels of 32": {"data": torch.zeros(3, -(-K // 8), 32, dtype=torch.int32)},
    "panels with strides": {"data": torch.zeros(3, 16, -(-K // 8), dtype=torch.int32).transpose(1, 2)},
    "no scales": {"scales": None},
    "no minima": {"minima": None},
    "scales of int8": {"scales": operands()["scales"]},
    "scales of fewer panels": {"scales": operands("int4")["scales"][:-1]},
    "minima of fewer panels": {"minima": operands("int4")["minima"][:-1]},
    "minima of fewer groups": {"minima": operands("int4")["minima"][:, :1].contiguous()},
    "minima in float32": {"minima": operands("int4")["minima"].float()},
    "dynamic": {"dynamic": True},
    "minima with strides": {"minima": torch.zeros(3, 32, 2, dtype=torch.float16).transpose(1, 2)},
}
BAD_OUT = {
    "fewer rows": torch.zeros(ROWS - 1, N),
    "fewer columns": torch.zeros(ROWS, N - 1),
    "bfloat16": torch.zeros(ROWS, N, dtype=torch.bfloat16),
    "strides": torch.zeros(N, ROWS).T,
    "flat": torch.zeros(ROWS * N),
}


@pytest.mark.parametrize(("stored", "what"), [("int8", what) for what in BAD] + [("int4", what) for what in BAD_INT4])
def test_operands_that_do_not_fit(stored, what):
    given = operands(stored) | (BAD if stored == "int8" else BAD_INT4)[what]
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.vpt_kernels.packed_linear.cpp(*given.values())
    out = torch.full((ROWS, N), 7.0)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.vpt_kernels.packed_linear_into.cpp(*given.values(), out)
    assert (out == 7).all()


@pytest.mark.parametrize("what", BAD_OUT)
def test_an_out_that_does_not_fit(what):
    out = BAD_OUT[what]
    before = out.clone()
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.vpt_kernels.packed_linear_into.cpp(*operands().values(), out)
    assert_same_bits(out, before)


def test_operands_that_fit():
    """What the cases above change is right before."""
    for stored, gated in (("int8", False), ("float32", True), ("int4", True), ("w8a8", False)):
        torch.ops.vpt_kernels.packed_linear.cpp(*operands(stored, gated).values())


@pytest.mark.parametrize("stored", ("float32", "int8", "int4"))
def test_a_weight_put_together_by_hand(stored):
    """Its fields contradict each other."""
    packed = pack_weight(normal(N, K, key="w"), stored)
    for columns in (K - 8, K + 8):
        with pytest.raises((ValueError, RuntimeError)):
            packed_linear(normal(ROWS, columns, key="x"), replace(packed, in_features=columns))
    for features in (N - 16, N + 16, -1):
        with pytest.raises((ValueError, RuntimeError)):
            packed_linear(normal(ROWS, K, key="x"), replace(packed, out_features=features))
    with pytest.raises((ValueError, RuntimeError)):
        packed_linear(normal(ROWS, K, key="x"), replace(packed, gated=True), activation="silu")
