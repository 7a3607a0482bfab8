"""`packed_linear` on every instruction set of this machine, against float64 and against itself."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_same_bits, each_backend, each_dtype, normal, numbers
from tests.kernels.instruction_sets import expected
from tests.kernels.packed_checks import (
    ACTIVATIONS,
    check,
    each_set,
    kernels,
    not_interpreted,
    rounding_of_x,
)
from vpt_kernels import pack_weight, packed_linear

pytestmark = not_interpreted

STORED = ("float32", "bfloat16", "float16", "int8", "int4", "w8a8")
each_stored = pytest.mark.parametrize("stored", STORED)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 15, 16, 17, 19, 28, 29, 128, 257, 811)
"""Around every tile, every path and a prime."""


def test_every_instruction_set_is_tested():
    """What the kernel names in /proc/cpuinfo is used, and the widest by default."""
    assert kernels.names == expected() and kernels.widest == expected()[0]


@each_set
@each_stored
@pytest.mark.parametrize("rows", ROWS)
def test_rows(name, stored, rows):
    """Prime widths: no tile, panel, pair or block is whole."""
    packed = pack_weight(normal(331, 523, key="w"), stored)
    with kernels(name):
        check(normal(rows, 523, key="x"), packed)


@each_set
@each_stored
@pytest.mark.parametrize("shape", ((1, 1), (1, 7), (16, 1), (17, 2), (15, 255), (33, 257), (160, 1536), (48, 1027)))
def test_shapes(name, stored, shape):
    packed = pack_weight(normal(*shape, key="w"), stored)
    with kernels(name):
        for rows in (1, 5, 40):
            check(normal(60, shape[1], key="x"), packed, at_once=rows)


@each_set
@each_dtype
@pytest.mark.parametrize("stored", ("float32", "bfloat16", "float16"))
def test_dtypes_of_x(name, dtype, stored):
    """Any stored precision with any activations; the result is rounded once."""
    packed = pack_weight(normal(45, 301, key="w"), stored)
    with kernels(name):
        for rows in (1, 6, 33):
            x, residual = normal(rows, 301, key="x", dtype=dtype), normal(rows, 45, key="r", dtype=dtype)
            check(x, packed, normal(45, key="b"), residual)


@each_set
@each_backend
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_activations(name, backend, activation, gated):
    """Small and large arguments, where the exponential and the error function have their ends."""
    packed = pack_weight(normal(2 * 67, 128, key="w"), gated=gated)
    with kernels(name):
        for scale in (1e-3, 0.1, 1.0, 8.0):
            x = normal(40, 128, key="x", scale=scale)
            residual = normal(40, packed.out_features, key="r")
            check(x, packed, normal(134, key="b"), residual, activation, backend)
            check(x, packed, None, None, activation, backend, at_once=3)


@each_set
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_an_activation_of_every_size(name, activation):
    """One column, so that the activation's argument is known: within 4 units of what float64 gives, or 1e-7 of it."""
    x = torch.cat([torch.linspace(-120, 120, 9601), torch.logspace(-30, 0, 200), -torch.logspace(-30, 0, 200)])[:, None]
    with kernels(name):
        actual = packed_linear(x, pack_weight(torch.ones(1, 1)), activation=activation)
    oracle = ACTIVATIONS[activation](x.double())
    allowed = 4 * torch.finfo(torch.float32).eps * oracle.abs() + 1.5e-7 * x.abs().clamp_max(8).double()
    assert ((actual.double() - oracle).abs() <= allowed).all()


@each_set
@each_stored
def test_gated_is_two_layers(name, stored):
    """Gate and up of a gated weight are those of two weights."""
    gate, up = normal(45, 130, key="g", scale=0.1), normal(45, 130, key="u", scale=0.1)
    both = pack_weight([gate, up], stored, gated=True)
    x = normal(9, 130, key="x")
    with kernels(name):
        parts = [packed_linear(x, pack_weight(weight, stored)) for weight in (gate, up)]
        actual = packed_linear(x, both, activation="silu")
    torch.testing.assert_close(actual, F.silu(parts[0]) * parts[1], rtol=1e-5, atol=1e-6)


@each_set
@each_stored
def test_long_doubles_of_the_caller_survive(name, stored):
    """An MMX register in use without EMMS makes the next ones NaN, in whatever library."""
    remainder = ctypes.CDLL(None).fmodl
    remainder.argtypes, remainder.restype = [ctypes.c_longdouble] * 2, ctypes.c_longdouble
    packed = pack_weight(normal(45, 301, key="w"), stored)
    with kernels(name):
        for rows in (1, 6, 33):
            packed_linear(normal(rows, 301, key="x"), packed)
            assert remainder(7.5, 2.0) == 1.5


@each_set
@pytest.mark.parametrize("group_size", (None, 32))
@pytest.mark.parametrize("rows", (1, 3, 16, 60))
def test_int8_sums_are_exact(name, group_size, rows):
    """Integers in, integers out: with scales of one, nothing is rounded."""
    columns = 1000
    weight = torch.from_numpy(numbers("w").integers(-127, 128, (37, columns))).float()
    weight[:, ::32] = 127  # every group's scale is 1
    x = torch.from_numpy(numbers("x").integers(-9, 10, (rows, columns))).float()
    x[:, ::256] = 32767 / 4096  # so that 16 bits hold what is there: steps of 1/4096
    with kernels(name):
        actual = packed_linear(x, pack_weight(weight, "int8", group_size=group_size))
    oracle = x.double() @ weight.double().T
    bound = rounding_of_x(x, weight)
    assert ((actual.double() - oracle).abs() <= bound + 1e-6 * oracle.abs().clamp_min(1e3)).all()


@each_set
@pytest.mark.parametrize("rows", (1, 3, 16, 60))
@pytest.mark.parametrize("columns", (1000, 1021))
def test_int4_sums_are_exact(name, columns, rows):
    """Integers in, integers out: scales are one, minima −8 or whatever, and x has 16 bits in steps of 1/4096."""
    weight = torch.from_numpy(numbers("w").integers(-8, 8, (37, columns))).float()
    weight[:, ::32], weight[:, 1::32] = -8, 7
    weight += torch.arange(37)[:, None]
    x = torch.from_numpy(numbers("x").integers(-9, 10, (rows, columns))).float()
    x[:, ::256] = 32767 / 4096
    with kernels(name):
        packed = pack_weight(weight, "int4")
        assert_same_bits(packed.dequantize(), weight)
        actual = packed_linear(x, packed)
    oracle = x.double() @ weight.double().T
    bound = rounding_of_x(x, weight)
    assert ((actual.double() - oracle).abs() <= bound + 1e-6 * oracle.abs().clamp_min(1e3)).all()


@each_set
@pytest.mark.parametrize("columns", (1000, 1022, 1023))
def test_w8a8_sums_are_exact(name, columns):
    """x in integers up to 127, weights too: nothing is rounded, with a whole last four columns or without."""
    weight = torch.from_numpy(numbers("w").integers(-127, 128, (37, columns))).float()
    x = torch.from_numpy(numbers("x").integers(-127, 128, (60, columns))).float()
    weight[:, 0] = 127
    x[:, ::256] = 127
    with kernels(name):
        for rows in (1, 14, 15, 60):
            actual = packed_linear(x[:rows], pack_weight(weight, "w8a8"))
            oracle = x[:rows].double() @ weight.double().T
            # In 16 bits a step of 127 / 32767 is between the integers.
            bound = rounding_of_x(x[:rows], weight) if rows <= 14 or name != "avx512" else 0
            assert ((actual.double() - oracle).abs() <= bound + 1e-6 * oracle.abs().clamp_min(1e4)).all()


@each_set
def test_w8a8_is_int8_with_few_rows_and_where_bytes_are_no_faster(name):
    weight, x = normal(40, 300, key="w"), normal(40, 300, key="x")
    with kernels(name):
        for rows in (1, 14, 15, 40):
            both = [packed_linear(x[:rows], pack_weight(weight, kept)) for kept in ("int8", "w8a8")]
            if rows <= 14 or name != "avx512":
                assert_same_bits(*both)
            else:
                assert (both[0] - both[1]).abs().max() > 1e-3


@each_set
def test_int8_of_the_largest_numbers(name):
    """256 products of 127 and 32767 fit an int32; one more bit would not."""
    weight = torch.full((17, 1024), -3.0)
    x = torch.full((2, 1024), 5.0)
    with kernels(name):
        actual = packed_linear(x, pack_weight(weight, "int8"))
    torch.testing.assert_close(actual, torch.full((2, 17), -15360.0), rtol=1e-5, atol=0)


@each_set
@each_stored
def test_repeats_and_threads(name, stored):
    """The same bits from every call and every number of threads."""
    packed = pack_weight(normal(700, 513, key="w"), stored)
    before = torch.get_num_threads()
    try:
        with kernels(name):
            for rows in (1, 7, 20, 100):
                x, results = normal(rows, 513, key="x"), []
                for threads in (1, 2, 3, 2):
                    torch.set_num_threads(threads)
                    results.append(packed_linear(x, packed))
                for other in results[1:]:
                    assert_same_bits(other, results[0])
    finally:
        torch.set_num_threads(before)


@each_set
@each_stored
def test_a_row_stands_alone(name, stored):
    """NaN and infinity stay in their row, and a row's neighbours do not show in it."""
    packed = pack_weight(normal(50, 300, key="w"), stored)
    with kernels(name):
        for rows in (2, 9, 30):
            x = normal(rows, 300, key="x")
            clean = packed_linear(x, packed)
            x[1, 17] = float("nan")
            actual = packed_linear(x, packed)
            assert actual[1].isnan().all()
            x[1, 17] = float("inf")
            assert not packed_linear(x, packed)[1].isfinite().any()
            others = [row for row in range(rows) if row != 1]
            assert_same_bits(actual[others], clean[others])


@each_set
def test_nan_weights_stay_in_their_column(name):
    weight = normal(40, 64, key="w")
    weight[3, 5] = float("nan")
    with kernels(name):
        for stored in ("float32", "bfloat16", "float16"):
            actual = packed_linear(normal(4, 64, key="x"), pack_weight(weight, stored))
            assert actual[:, 3].isnan().all() and actual[:, torch.arange(40) != 3].isfinite().all()


@each_set
@each_backend
def test_nothing_to_multiply(name, backend):
    with kernels(name):
        for stored in STORED:
            packed = pack_weight(normal(5, 4, key="w"), stored)
            assert packed_linear(torch.zeros(0, 4), packed, backend=backend).shape == (0, 5)
            assert packed_linear(torch.zeros(3, 0, 4), packed, backend=backend).shape == (3, 0, 5)
            no_rows = pack_weight(torch.zeros(0, 4), stored)
            assert packed_linear(torch.ones(2, 4), no_rows, backend=backend).shape == (2, 0)
            no_columns = pack_weight(torch.zeros(5, 0), stored)
            bias = normal(5, key="b")
            actual = packed_linear(torch.ones(2, 0), no_columns, bias, backend=backend)
            assert_same_bits(actual, bias.expand(2, 5).contiguous())


@each_backend
@each_stored
def test_strides(backend, stored):
    """Rows of wider matrices, and no element beside the result's is touched."""
    packed = pack_weight(normal(21, 50, key="w"), stored)
    for rows in (1, 4, 35):
        wide, sums, buffer = normal(rows, 90, key="x"), normal(rows, 40, key="r"), torch.full((rows, 64), 7.0)
        x, residual, out = wide[:, 20:70], sums[:, 3:24], buffer[:, 9:30]
        want = packed_linear(x.contiguous(), packed, None, residual.contiguous(), backend=backend)
        assert packed_linear(x, packed, None, residual, out=out, backend=backend) is out
        assert_same_bits(out.contiguous(), want)
        buffer[:, 9:30] = 7
        assert (buffer == 7).all()
        every_other = normal(2 * rows, 50, key="y")[::2]
        assert_same_bits(
            packed_linear(every_other, packed, backend=backend),
            packed_linear(every_other.contiguous(), packed, backend=backend),
        )


@each_backend
def test_out_may_be_the_residual(backend):
    packed = pack_weight(normal(21, 50, key="w"), "bfloat16")
    for rows in (2, 40):
        x, residual = normal(rows, 50, key="x"), normal(rows, 21, key="r")
        want = packed_linear(x, packed, None, residual, backend=backend)
        assert packed_linear(x, packed, None, residual, out=residual, backend=backend) is residual
        assert_same_bits(residual, want)


@each_backend
def test_out_may_be_a_view_of_the_residual(backend):
    """The same rows by another tensor, in one or two leading dimensions, in a wider buffer too."""
    packed = pack_weight(normal(21, 50, key="w"), "int8")
    x, residual = normal(6, 50, key="x"), normal(6, 21, key="r")
    want = packed_linear(x, packed, None, residual, backend=backend)
    for whole in (torch.zeros(6, 21), torch.zeros(6, 40)):
        out = whole[:, :21].copy_(residual)
        packed_linear(x, packed, None, whole[:, :21], out=out, backend=backend)
        assert_same_bits(out.contiguous(), want)
    out = residual.clone().view(2, 3, 21)
    packed_linear(x.view(2, 3, 50), packed, None, out.view(2, 3, 21), out=out, backend=backend)
    assert_same_bits(out.view(6, 21), want)


@each_backend
def test_out_over_anything_else_is_refused(backend):
    """Whatever is read, the weight's own memory included, is what it was."""
    packed = pack_weight(normal(21, 50, key="w"), "int4")
    given = {"x": normal(6, 50, key="x"), "bias": normal(21, key="b"), "residual": normal(6, 21, key="r")}
    for name in ("x", "bias", "residual", "data", "scales", "minima"):
        tensor = given[name] if name in given else getattr(packed, name)
        memory = torch.zeros(6 * 21 + tensor.numel())
        inside = memory[-tensor.numel() :].view(tensor.dtype).flatten()[-tensor.numel() :].view(tensor.shape)
        inside.copy_(tensor)
        arguments, weight = dict(given), packed
        if name in given:
            arguments[name] = inside
        else:
            weight = replace(packed, **{name: inside})
        out = memory[-6 * 21 - tensor.nbytes // 8 :][: 6 * 21].view(6, 21)
        with pytest.raises(ValueError, match=f"{name} and out share memory"):
            packed_linear(arguments.pop("x"), weight, **arguments, out=out, backend=backend)
        assert_same_bits(inside, tensor)


@each_backend
def test_out_that_begins_where_the_residual_does_is_refused(backend):
    """Rows that lie closer together would overwrite what later ones read."""
    packed = pack_weight(normal(21, 50, key="w"))
    memory = normal(6 * 40, key="r")
    before = memory.clone()
    residual, out = memory.view(6, 40)[:, :21], memory[: 6 * 21].view(6, 21)
    with pytest.raises(ValueError, match="residual and out share memory"):
        packed_linear(normal(6, 50, key="x"), packed, None, residual, out=out, backend=backend)
    assert_same_bits(memory, before)


@each_backend
def test_leading_dimensions(backend):
    packed = pack_weight(normal(21, 50, key="w"))
    x = normal(2, 3, 50, key="x")
    actual = packed_linear(x, packed, backend=backend)
    assert actual.shape == (2, 3, 21)
    assert_same_bits(actual.flatten(0, 1), packed_linear(x.flatten(0, 1), packed, backend=backend))
    out = torch.empty(2, 3, 21)
    packed_linear(x, packed, out=out, backend=backend)
    assert_same_bits(out, actual)
    one = packed_linear(x[0, 0], packed, backend=backend)
    assert one.shape == (21,)


@each_backend
def test_inputs_stay(backend):
    packed = pack_weight(normal(21, 50, key="w"), "int8")
    given = [normal(6, 50, key="x"), normal(21, key="b"), normal(6, 21, key="r")]
    before = [t.clone() for t in (*given, packed.data, packed.scales)]
    packed_linear(given[0], packed, *given[1:], "gelu", backend=backend)
    for now, then in zip((*given, packed.data, packed.scales), before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no huge pages",
)
def test_panels_ask_for_huge_pages():
    data = pack_weight(normal(1024, 4096, key="w")).data
    middle, inside = data.data_ptr() + data.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *fields = line.split()
        if first == "VmFlags:" and inside:
            assert "hg" in fields
            return
        if "-" in first and not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            inside = begin <= middle < end
    raise AssertionError("the panels are in no mapping")
