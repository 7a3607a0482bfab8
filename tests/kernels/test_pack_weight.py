"""`pack_weight` and the way back: what is stored, how far it is from what was given, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_same_bits, each_dtype, normal
from vpt_kernels import pack_weight
from vpt_kernels.backends import EXTENSION_PROBLEM
from vpt_kernels.library import OPS

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4", "w8a8")
SHAPES = ((1, 1), (3, 31), (16, 32), (17, 33), (40, 65), (50, 256), (21, 523))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PRECISIONS)
def test_there_and_back(name, shape):
    """All rows and single ones, a table's in any order, are the weight's up to the rounding that is documented."""
    weight = normal(*shape, key="w")
    packed = pack_weight(weight, name)
    found = packed.dequantize()
    assert packed.precision == name and found.shape == shape
    if name in ("int8", "w8a8"):
        allowed = weight.abs().amax(1, keepdim=True) / 127 / 2
    elif name == "int4":
        allowed = int4_error(weight)
    else:
        allowed = torch.zeros(1)
        weight = weight.to(packed.dtype).float()
    assert ((found - weight).abs() <= allowed * (1 + 1e-5)).all()
    ids = torch.tensor([[shape[0] - 1, 0], [shape[0] // 2, 0]])
    assert_same_bits(packed.rows(ids), found[ids])


def int4_error(weight: torch.Tensor) -> torch.Tensor:
    """Half a step of the group, and what rounding the scale and the minimum to float16 adds."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32), "replicate").unflatten(1, (-1, 32))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    allowed = step / 2 + (15 * step + groups.amin(-1).abs()) * 2.0**-11 + 2.0**-24
    return allowed.repeat_interleave(32, 1)[:, : weight.shape[1]]


@each_dtype
@pytest.mark.parametrize("scale", (1e-5, 1.0, 1000.0))
def test_int4_of_small_and_large_numbers(dtype, scale):
    weight = normal(33, 100, key="w", scale=scale, dtype=dtype)
    found = pack_weight(weight, "int4").dequantize()
    # Steps below the subnormal numbers of float16 are off by as much as those are apart.
    assert ((found - weight.float()).abs() <= int4_error(weight.float()) + 15 * 2.0**-25).all()


def test_int4_of_constant_groups_is_exact():
    weight = torch.tensor([[0.5, -3.0, 0.0]]).repeat_interleave(32, 1)
    assert_same_bits(pack_weight(weight, "int4").dequantize(), weight)


def test_int4_in_bits():
    """Column 2p of eight in bits 4p of its row's word, column 2p + 1 in bits 16 + 4p; groups of one row 16 apart."""
    weight = torch.zeros(16, 40)
    weight[2, :8] = torch.arange(8.0)
    weight[2, 31] = 15
    weight[2, 39] = -2
    packed = pack_weight(weight, "int4")
    assert packed.dtype == torch.int32 and packed.data.shape == (1, 5, 16)
    assert packed.data[0, 0, 2] == 0x75316420 and packed.data[0, 3, 2] == -(1 << 28)
    assert packed.scales is not None and packed.minima is not None and packed.scales.shape == (1, 1, 32)
    assert packed.scales[0, 0, 2] == 1 and packed.minima[0, 0, 16 + 2] == -2
    assert packed.minima.abs().sum() == 2
    # 4 bits a weight, and two numbers of 16 bits for 32 columns, the last group's and one behind it in whole.
    assert packed.nbytes == 16 * (5 * 4 + 2 * 2 * 2)


@pytest.mark.parametrize("name", ("int8", "int4", "w8a8"))
def test_rows_of_two_layers_are_quantised_alike(name):
    gate, up = normal(20, 70, key="g"), normal(20, 70, key="u")
    both = pack_weight([gate, up], name, gated=True).dequantize()
    apart = [pack_weight(weight, name).dequantize() for weight in (gate, up)]
    assert_same_bits(both, torch.cat(apart))
    assert_same_bits(pack_weight(torch.cat(apart), name).dequantize(), torch.cat(apart))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("name", ("int8", "int4", "w8a8"))
def test_what_integers_cannot_hold_is_refused(name, value):
    weight = normal(20, 70, key="w")
    weight[3, 69] = value
    with pytest.raises(ValueError, match="NaN"):
        pack_weight(weight, name)


def test_int4_refuses_numbers_beyond_float16():
    weight = torch.zeros(4, 40)
    for value in (65504.0, -65504.0):
        weight[1, 2] = value
        pack_weight(weight, "int4")
    for value in (-66000.0, 66000.0 * 15):
        weight[1, 2] = value
        with pytest.raises(ValueError, match="beyond ±65504"):
            pack_weight(weight, "int4")


def test_group_sizes():
    weight = normal(4, 64, key="w")
    assert_same_bits(pack_weight(weight, "int4", group_size=32).data, pack_weight(weight, "int4").data)
    with pytest.raises(ValueError, match="only int8 and int4 have scales"):
        pack_weight(weight, "bfloat16", group_size=32)
    with pytest.raises(ValueError, match="a scale per row"):
        pack_weight(weight, "w8a8", group_size=32)


@pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason="the C++ extension is missing")
def test_a_call_past_the_checks_stays_within_its_tensors():
    x, packed, int8 = (
        normal(2, 70, key="x"),
        pack_weight(normal(20, 70, key="w"), "int4"),
        torch.zeros(2, 35, 32).char(),
    )
    assert packed.scales is not None and packed.minima is not None
    call = OPS["packed_linear"]["cpp"]
    rest = (20, False, False, None, None, 0)
    call(x, packed.data, packed.scales, packed.minima, *rest)
    short, wide = packed.minima[:, :1].contiguous(), packed.minima.float()
    grouped = torch.ones(2, 3, 16)
    for wrong, words in (
        ((packed.data, packed.scales, short, *rest), "minima of int4"),
        ((packed.data, packed.scales, wide, *rest), "minima of int4"),
        ((packed.data, short, packed.minima, *rest), "scales of int4"),
        ((packed.data, packed.scales, None, *rest), "minima with int4"),
        ((packed.data[:, :8].contiguous(), packed.scales, packed.minima, *rest), "data must be"),
        ((int8, grouped, packed.minima, *rest), "minima with int4"),
        ((int8, grouped, None, 20, False, True, None, None, 0), "dynamic goes with int8"),
        ((packed.data, packed.scales, packed.minima, 20, False, True, None, None, 0), "dynamic goes with int8"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            call(x, *wrong)
    with pytest.raises((RuntimeError, ValueError), match="float32, bfloat16 and float16 only"):
        call(x.int(), packed.data, packed.scales, packed.minima, *rest)
