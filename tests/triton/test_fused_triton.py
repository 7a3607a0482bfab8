"""What stands between a layer's products, against float64; where nothing is summed, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits, assert_twice_as_good, each_dtype, normal
from tests.model.inputs import tiny_model
from tests.triton.watch import Launches
from vpt_model.network import decode, fused
from vpt_model.network.fused import reference

EPS = 1e-6
FEW, DRAWS = 100, 24
"""Errors of fewer numbers than these are judged over several draws: a handful says nothing of a root mean square."""


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)


def check(function, composition, inputs: Callable[[int], Sequence[Tensor | float | None]]) -> list[Tensor]:
    """One launch a call, and every result within twice the error of PyTorch's composition; those of the first draw.

    inputs: the arguments of a draw.
    """
    draws = [inputs(0)]
    draws += [inputs(draw) for draw in range(1, DRAWS)] if draws[0][0].numel() < FEW else []

    def results(function, arguments, dtype: torch.dtype | None = None) -> list[Tensor]:
        found = function(*(x.to(dtype, copy=True) if isinstance(x, Tensor) else x for x in arguments))
        return [found] if isinstance(found, Tensor) else list(found)

    with Launches() as launches:
        ours = [results(function, arguments) for arguments in draws]
    assert len(launches.grids) == len(draws)
    eager, oracle = ([results(composition, each, dtype) for each in draws] for dtype in (None, torch.float64))
    for found in zip(*(map(torch.stack, zip(*each, strict=True)) for each in (ours, eager, oracle)), strict=True):
        assert_twice_as_good(*found)
    return ours[0]


@each_dtype
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("rows, columns", [(5, 1536), (3, 130), (1, 7)])
def test_add_rms_norm(dtype, added, rows, columns):
    def inputs(draw: int) -> tuple[Tensor, Tensor | None, Tensor, float]:
        x, delta = (normal(rows, columns, key=(name, draw), dtype=dtype) for name in "xd")
        return x, delta if added else None, normal(columns, key=("w", draw), dtype=dtype), EPS

    total, _ = check(fused.add_rms_norm, reference.add_rms_norm, inputs)
    x, delta, *_ = inputs(0)
    assert_same_bits(total, x + delta if added else x, "the sum")


@each_dtype
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("rows, columns", [(5, 1280), (3, 130), (1, 7)])
def test_add_layer_norm(dtype, added, rows, columns):
    """Behind a mean that is large against the deviations, whose squares must not cancel."""

    def inputs(draw: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
        x, delta = (normal(rows, columns, key=(name, draw), dtype=dtype) for name in "xd")
        weight, bias = (normal(columns, key=(name, draw), dtype=dtype) for name in "wb")
        return x + 8, delta if added else None, weight, bias, EPS

    total, _ = check(fused.add_layer_norm, reference.add_layer_norm, inputs)
    x, delta, *_ = inputs(0)
    assert_same_bits(total, x + delta if added else x, "the sum")


@each_dtype
@pytest.mark.parametrize("rows, columns", [(4, 1100), (1, 3)])
def test_silu_mul(dtype, rows, columns):
    size = {"dtype": dtype, "scale": 4}
    check(fused.silu_mul, reference.silu_mul, lambda draw: (normal(rows, 2 * columns, key=("p", draw), **size),))


@each_dtype
@pytest.mark.parametrize("rows, columns", [(4, 1100), (1, 3)])
def test_quick_gelu(dtype, rows, columns):
    size = {"dtype": dtype, "scale": 4}
    check(fused.quick_gelu, reference.quick_gelu, lambda draw: (normal(rows, columns, key=("x", draw), **size),))


@each_dtype
@pytest.mark.parametrize("heads, dim", [(16, 80), (3, 8), (9, 2)])
def test_rotate_packed(dtype, heads, dim):
    """In place, to the bit, and v is as it was."""
    packed, angles = normal(6, 3, heads, dim, key="p", dtype=dtype), normal(6, 1, dim // 2, key="a")
    before = packed.clone()
    found = fused.rotate_packed(packed, angles.cos(), angles.sin())
    for ours, expected in zip(found, reference.rotate_packed(before, angles.cos(), angles.sin())):
        assert_same_bits(ours, expected)
    assert all(x.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for x in found)


@pytest.mark.parametrize("kind", ["detection", "seg"])
def test_the_blocks_of_a_re_encoder(kind):
    """A norm and the sum before it are one launch, as often as there are norms; SAM's last sum has none behind it."""
    encoder = tiny_model(kind).encoder
    patches = normal(encoder.grid[0] * encoder.grid[1], encoder.width, key=kind)
    with torch.inference_mode():
        with Launches() as launches:
            found = encoder(patches)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "on_gpu", decode.on_gpu)
            expected = encoder(patches)
    assert (found - expected).abs().max() <= 1e-4 and expected.std() > 0.5
    norms = 2 * len(encoder.encoder.layer) + 1 if kind == "detection" else 2 * len(encoder.layers)
    assert [name for name, _ in launches.grids] == norms * ["add_layer_norm_kernel"]


def test_no_rows():
    x, weight = torch.empty(0, 8), torch.ones(8)
    assert [len(y) for y in fused.add_rms_norm(x, x, weight, EPS)] == [0, 0] == [len(fused.silu_mul(x))] * 2
    assert [len(y) for y in fused.add_layer_norm(x, x, weight, weight, EPS)] == [0, 0] == [len(fused.quick_gelu(x))] * 2
    assert [len(y) for y in fused.rotate_packed(x.view(0, 3, 2, 4), x[:, :2], x[:, :2])] == [0, 0, 0]


def test_a_cpu_takes_the_composition(monkeypatch):
    monkeypatch.setattr(fused, "on_gpu", decode.on_gpu)
    with Launches() as launches:
        x = normal(3, 6, key="x")
        fused.add_rms_norm(x, x, x[0], EPS), fused.add_layer_norm(x, x, x[0], x[0], EPS), fused.silu_mul(x)
        fused.quick_gelu(x), fused.rotate_packed(x.view(3, 3, 1, 2), x[:, None, :1], x[:, None, :1])
    assert not launches.grids
