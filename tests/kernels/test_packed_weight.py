"""`pack_weight`: what the panels hold is the weight, or the nearest that its scales allow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import assert_same_bits, normal, numbers
from tests.kernels.packed_checks import check, each_set, kernels, not_interpreted
from vpt_kernels import PackedWeight, pack_weight

pytestmark = not_interpreted

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ((1, 1), (16, 32), (17, 33), (40, 7), (331, 523), (1030, 64))
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_group = pytest.mark.parametrize("group_size", (None, 32))


def uneven(rows: int, columns: int) -> Tensor:
    """Numbers whose size differs a hundredfold from row to row and from column to column."""
    size = 10 ** normal(rows, 1, key="rows").clamp(-1, 1) * 10 ** normal(1, columns, key="columns").clamp(-1, 1)
    return normal(rows, columns, key="w") * size


def scales_of(weight: Tensor, group_size: int | None) -> Tensor:
    """max |w| / 127 of a row or of 32 columns of it, for every number: float64 like `weight`."""
    wide = weight.double().abs()
    if group_size is None:
        return (wide.amax(1, keepdim=True) / 127).expand_as(wide)
    parts = [part.amax(1, keepdim=True).expand_as(part) for part in wide.split(group_size, 1)]
    return torch.cat(parts, 1) / 127


@each_shape
@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_floats_come_back(shape, given, stored):
    weight = uneven(*shape).to(FLOATS[given])
    packed = pack_weight(weight, stored)
    assert (packed.in_features, packed.out_features, packed.dtype) == (*shape[::-1], FLOATS[stored])
    assert_same_bits(packed.dequantize(torch.float64), weight.to(FLOATS[stored]).double())


@each_shape
@each_group
def test_int8_is_the_nearest_of_its_scale(shape, group_size):
    """At most half a step away, and a step no wider than the largest number demands."""
    weight = uneven(*shape)
    off = (pack_weight(weight, "int8", group_size=group_size).dequantize(torch.float64) - weight.double()).abs()
    steps = scales_of(weight, group_size)
    assert (off <= steps * (0.5 + 1e-4)).all()
    if weight.numel() > 1000:
        assert (off / steps).mean() == pytest.approx(0.25, abs=0.02)  # as the nearest of evenly spaced numbers is


@each_group
def test_int8_of_nothing_and_of_integers(group_size):
    """Zeros have no scale; integers up to 127 beside one of 127 come back as they are."""
    weight = torch.from_numpy(numbers("w").integers(-127, 128, (20, 96))).float()
    weight[:, ::32], weight[3], weight[7, 32:64] = 127, 0, 0
    assert_same_bits(pack_weight(weight, "int8", group_size=group_size).dequantize(), weight)


@pytest.mark.parametrize("stored", (*FLOATS, "int8"))
def test_parts_and_gates_are_rows_below_each_other(stored):
    """Odd numbers of rows, so that parts begin within panels; strides of any kind."""
    parts = [uneven(rows, 45) for rows in (5, 24, 13)]
    parts[1] = parts[1].T.contiguous().T
    whole = torch.cat(parts)
    assert_same_bits(pack_weight(parts, stored).dequantize(), pack_weight(whole, stored).dequantize())
    gated = pack_weight(parts, stored, gated=True)
    assert gated.gated and gated.out_features == 21
    assert_same_bits(gated.dequantize(), pack_weight(whole, stored).dequantize())


def as_rows(packed: PackedWeight, ids: Tensor, dtype: torch.dtype) -> None:
    assert_same_bits(packed.rows(ids, dtype), packed.dequantize(dtype)[ids.long()])


@each_shape
@pytest.mark.parametrize("stored", (*FLOATS, "int8", "int8 in groups"))
def test_rows_are_those_of_the_weight(shape, stored):
    """Of any shape of ids, repeated, none."""
    group_size = 32 if stored == "int8 in groups" else None
    packed = pack_weight(uneven(*shape), stored.split()[0], group_size=group_size)
    ids = torch.from_numpy(numbers("ids").integers(0, shape[0], (3, 7)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        as_rows(packed, ids, dtype)
        as_rows(packed, torch.arange(shape[0] - 1, -1, -1, dtype=torch.int32), dtype)
        as_rows(packed, ids[0, 0], dtype)
        as_rows(packed, ids[:, :0], dtype)


@pytest.mark.filterwarnings("error")
def test_a_fake_weight_is_packed_without_memory():
    with FakeTensorMode():
        packed = pack_weight(torch.empty(4096, 1024))
    assert packed.data.shape == (256, 512, 32) and packed.out_features == 4096


def test_rows_that_are_not_there():
    packed = pack_weight(uneven(17, 5))
    for ids in ([17], [-1], [0, 1 << 40]):
        with pytest.raises(ValueError, match=r"rows are 0\.\.16"):
            packed.rows(torch.tensor(ids))
    with pytest.raises(TypeError, match="int32 or int64"):
        packed.rows(torch.zeros(2))
    with pytest.raises(ValueError, match="gated"):
        pack_weight(uneven(16, 5), gated=True).rows(torch.tensor([0]))


@each_set
@pytest.mark.parametrize("shape", ((33, 31), (17, 257), (160, 1536), (48, 1027)))
@pytest.mark.parametrize("rows", (1, 2, 7, 16, 29, 60))
def test_products_in_groups(name, shape, rows):
    """Every group of 32 columns has another scale."""
    with kernels(name):
        check(normal(rows, shape[1], key="x"), pack_weight(uneven(*shape), "int8", group_size=32))


@pytest.mark.parametrize("number", (float("nan"), float("inf"), float("-inf")))
@each_group
def test_int8_refuses_what_it_cannot_hold(number, group_size):
    weight = uneven(40, 70)
    weight[39, 69] = number
    with pytest.raises(ValueError, match="NaN or an infinity"):
        pack_weight(weight, "int8", group_size=group_size)
