"""`pack_weight` and the way back: what is stored, how far it is from what was given, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import assert_same_bits, each_dtype, normal, numbers
from tests.kernels.packed_checks import check, each_set, kernels, not_interpreted
from vpt_kernels import PackedWeight, pack_weight

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4", "w8a8")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ((1, 1), (3, 31), (16, 32), (17, 33), (40, 65), (50, 256), (21, 523), (1030, 64))
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_group = pytest.mark.parametrize("group_size", (None, 32))


@each_shape
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


def test_int4_is_the_nearest_of_the_rounded_scale():
    """Scale and minimum are rounded to float16 first: a later rounding would leave other integers the nearest."""
    weight = normal(50, 256, key="w")
    groups = weight.unflatten(1, (-1, 32)).double()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, minimum = ((high - low).float() / 15).half().double(), low.half().double()
    off = (pack_weight(weight, "int4").dequantize(torch.float64).view(groups.shape) - groups).abs()
    within = (groups >= minimum) & (groups <= minimum + 15 * scale)
    assert within.double().mean() > 0.9 and (off[within] <= (scale * (0.5 + 1e-5)).expand_as(off)[within]).all()


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


@not_interpreted
@each_set
@pytest.mark.parametrize("shape", ((33, 31), (17, 257), (160, 1536), (48, 1027)))
@pytest.mark.parametrize("rows", (1, 2, 7, 16, 29, 60))
def test_products_in_groups(name, shape, rows):
    """Every group of 32 columns has another scale."""
    with kernels(name):
        check(normal(rows, shape[1], key="x"), pack_weight(uneven(*shape), "int8", group_size=32))
