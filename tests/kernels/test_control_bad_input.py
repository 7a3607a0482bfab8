"""`control_cross_attention` and `fold_projector` refuse bad input; nothing is broadcast, nothing written."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests.helpers import assert_same_bits, each_backend, normal
from tests.kernels.control_inputs import fold, parameters
from vpt_kernels import control_cross_attention, control_cross_attention_into, fold_projector

HIDDEN, CHANNELS, TOKENS = 20, 12, 7


def call(form: str = "linear", **changes) -> dict:
    """Arguments of a good call of two images, with changes."""
    shape = {"linear": (TOKENS, CHANNELS), "identity": (TOKENS, HIDDEN), "conv": (2, CHANNELS, 8, 12)}[form]
    good = {
        "features": normal(*shape, key="bad"),
        "control": normal(2, HIDDEN, key="bad control"),
        "projector": fold(form, HIDDEN, CHANNELS),
        "cu_seqlens": None if form == "conv" else torch.tensor([0, 3, TOKENS]),
    }
    return {**good, **changes}


def cu(*ends: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(ends, dtype=dtype)


def batch(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


CALLS = [
    # call, error, what the message names
    ("feature width", call(features=batch(7, 13)), ValueError, ["(7, 13)", "12"]),
    ("feature width, identity", call("identity", features=batch(7, 12)), ValueError, ["(7, 12)", "20"]),
    ("feature rank", call(features=batch(12)), ValueError, ["(12,)", "[tokens, 12]"]),
    ("feature rank 4", call(features=batch(1, 2, 7, 12)), ValueError, ["(1, 2, 7, 12)", "[tokens, 12]"]),
    ("feature dtype", call(features=batch(7, 12).bfloat16()), TypeError, ["features", "bfloat16", "float32"]),
    ("feature integers", call(features=batch(7, 12).int()), TypeError, ["features", "int32"]),
    ("feature type", call(features=np.zeros((7, 12))), TypeError, ["features", "ndarray"]),
    ("feature device", call(features=batch(7, 12).to("meta")), ValueError, ["features", "meta", "cpu"]),
    ("feature stride", call(features=batch(12, 7).T), ValueError, ["contiguous"]),
    ("feature gradient", call(features=batch(7, 12).requires_grad_()), ValueError, ["features", "no_grad"]),
    ("conv tokens", call("conv", features=batch(2, 6, 12)), ValueError, ["(2, 6, 12)", "[images, 12, h, w]"]),
    ("conv channels", call("conv", features=batch(2, 8, 8, 12)), ValueError, ["(2, 8, 8, 12)", "12"]),
    ("conv NHWC", call("conv", features=batch(2, 8, 8, 12)), ValueError, ["(2, 8, 8, 12)", "12, h, w"]),
    ("conv height", call("conv", features=batch(2, 12, 6, 8)), ValueError, ["(2, 12, 6, 8)", "multiples of 4"]),
    ("conv width", call("conv", features=batch(2, 12, 8, 7)), ValueError, ["(2, 12, 8, 7)", "multiples of 4"]),
    ("conv offsets", call("conv", cu_seqlens=cu(0, 12)), ValueError, ["cu_seqlens", "(2, 12, 8, 12)"]),
    ("offsets of a batch", call(features=batch(2, 7, 12), cu_seqlens=cu(0, 7, 14)), ValueError, ["cu_seqlens"]),
    ("offsets fall", call(cu_seqlens=cu(0, 5, 3, 7), control=batch(3, 20)), ValueError, ["[0, 5, 3, 7]", "rise"]),
    ("offsets do not end", call(cu_seqlens=cu(0, 3, 6)), ValueError, ["[0, 3, 6]", "7"]),
    ("offsets end late", call(cu_seqlens=cu(0, 3, 8)), ValueError, ["[0, 3, 8]", "7"]),
    ("offsets do not start", call(cu_seqlens=cu(1, 3, 7)), ValueError, ["[1, 3, 7]", "0"]),
    ("offsets start below", call(cu_seqlens=cu(-1, 3, 7)), ValueError, ["[-1, 3, 7]", "0"]),
    ("offsets beyond 32 bits", call(cu_seqlens=cu(0, (1 << 32) + 3, 7)), ValueError, [str((1 << 32) + 3)]),
    ("no offsets", call(cu_seqlens=cu()), ValueError, ["cu_seqlens", "empty"]),
    ("offset rank", call(cu_seqlens=cu(0, 3, 7)[None]), ValueError, ["cu_seqlens", "(1, 3)", "1"]),
    ("offset dtype", call(cu_seqlens=cu(0, 3, 7, dtype=torch.int16)), TypeError, ["cu_seqlens", "int16", "int32"]),
    ("offset floats", call(cu_seqlens=cu(0, 3, 7, dtype=torch.float32)), TypeError, ["cu_seqlens", "float32"]),
    ("offset list", call(cu_seqlens=[0, 3, 7]), TypeError, ["cu_seqlens", "list"]),
    ("offset device", call(cu_seqlens=cu(0, 3, 7).to("meta")), ValueError, ["cu_seqlens", "meta", "cpu"]),
    ("too few controls", call(control=batch(1, 20)), ValueError, ["(1, 20)", "2 image", "(2, 20)"]),
    ("too many controls", call(control=batch(3, 20)), ValueError, ["(3, 20)", "2 image"]),
    ("controls per token", call(control=batch(7, 20)), ValueError, ["(7, 20)", "2 image"]),
    ("controls of one image", call(cu_seqlens=None), ValueError, ["(2, 20)", "1 image"]),
    ("controls of a batch", call(features=batch(3, 7, 12), cu_seqlens=None), ValueError, ["(2, 20)", "3 image"]),
    ("controls of conv", call("conv", control=batch(1, 20)), ValueError, ["(1, 20)", "2 image"]),
    ("tokens of no image", call(control=batch(0, 20), cu_seqlens=cu(0)), ValueError, ["no image", "7"]),
    ("one control for none", call(features=batch(0, 12), cu_seqlens=cu(0)), ValueError, ["(2, 20)", "0 image"]),
    ("control width", call(control=batch(2, 21)), ValueError, ["(2, 21)", "(2, 20)"]),
    ("control rank", call(control=batch(40)), ValueError, ["control", "(40,)", "2"]),
    ("control dtype", call(control=batch(2, 20).double()), TypeError, ["control", "float64", "float32"]),
    ("control device", call(control=batch(2, 20).to("meta")), ValueError, ["control", "meta", "cpu"]),
    ("control stride", call(control=batch(20, 2).T), ValueError, ["control", "contiguous"]),
    ("control gradient", call(control=batch(2, 20).requires_grad_()), ValueError, ["control", "no_grad"]),
]


def refuses(function, error, named, *untouched: torch.Tensor) -> None:
    kept = [t.clone() for t in untouched]
    with pytest.raises(error) as raised:
        function()
    for text in named:
        assert text in str(raised.value)
    for tensor, before in zip(untouched, kept, strict=True):
        assert_same_bits(tensor, before, "output after an error")


@each_backend
@pytest.mark.parametrize("arguments, error, named", [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_calls(backend, arguments, error, named):
    refuses(partial(control_cross_attention, **arguments, backend=backend), error, named)
    out = torch.full((30, HIDDEN), float("nan"))
    into = partial(control_cross_attention_into, **arguments, out=out, rows=torch.arange(TOKENS), backend=backend)
    refuses(into, error, named, out)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


ROWS = torch.arange(TOKENS)
OUTPUTS = [
    ("width", nan(9, 21), ROWS, ValueError, ["(9, 21)", "20"]),
    ("rank", nan(1, 9, 20), ROWS, ValueError, ["out", "(1, 9, 20)", "2"]),
    ("dtype", nan(9, 20, dtype=torch.bfloat16), ROWS, TypeError, ["out", "bfloat16", "float32"]),
    ("stride", nan(20, 9).T, ROWS, ValueError, ["contiguous"]),
    ("device", nan(9, 20).to("meta"), ROWS, ValueError, ["out", "meta", "cpu"]),
    ("type", np.zeros((9, 20)), ROWS, TypeError, ["out", "ndarray"]),
    ("gradient", nan(9, 20).requires_grad_(), ROWS, ValueError, ["out", "no_grad"]),
    ("too few rows", nan(9, 20), ROWS[:-1], ValueError, ["rows", "6", "7"]),
    ("too many rows", nan(9, 20), torch.arange(8), ValueError, ["rows", "8", "7"]),
    ("row rank", nan(9, 20), ROWS[None], ValueError, ["rows", "(1, 7)", "1"]),
    ("row dtype", nan(9, 20), ROWS.float(), TypeError, ["rows", "float32", "int64"]),
    ("row mask", nan(9, 20), ROWS > 2, TypeError, ["rows", "bool", "int64"]),
    ("row list", nan(9, 20), ROWS.tolist(), TypeError, ["rows", "list"]),
    ("row device", nan(9, 20), ROWS.to("meta"), ValueError, ["rows", "meta", "cpu"]),
]


@each_backend
@pytest.mark.parametrize("out, rows, error, named", [row[1:] for row in OUTPUTS], ids=[row[0] for row in OUTPUTS])
def test_outputs(backend, out, rows, error, named):
    function = partial(control_cross_attention_into, **call(), out=out, rows=rows, backend=backend)
    refuses(function, error, named, *([out] if isinstance(out, torch.Tensor) and out.device.type == "cpu" else []))


def changed(form: str, **changes):
    found = {**parameters(form, HIDDEN, CHANNELS), **changes}
    return {name: value for name, value in found.items() if value is not None}


W, B = torch.zeros(HIDDEN, CHANNELS), torch.zeros(HIDDEN)
FOLDS = [
    ("form", "cosine", changed("linear"), ["cosine", "linear", "conv", "identity"]),
    ("no feature", "linear", changed("linear", feature=None), ["linear", "feature"]),
    ("no feature norm", "conv", changed("conv", feature_norm=None), ["conv", "feature_norm"]),
    ("identity with feature", "identity", changed("linear"), ["identity", "takes no"]),
    ("identity with norm", "identity", changed("linear", feature=None), ["identity", "takes no"]),
    ("feature width", "linear", changed("linear", feature=(W[:, :-1], B)), ["feature weight", "(20, 11)", "(20, 12)"]),
    ("feature bias", "linear", changed("linear", feature=(W, B[1:])), ["feature bias", "(19,)", "(20,)"]),
    ("feature rows", "linear", changed("linear", feature=(W[1:], B)), ["feature weight", "(19, 12)", "(20, 12)"]),
    ("conv as linear", "linear", changed("conv"), ["feature weight", "(20, 12, 4, 4)", "(20, 12)"]),
    ("linear as conv", "conv", changed("linear"), ["feature weight", "(20, 12)", "(20, 12, 4, 4)"]),
    ("conv kernel", "conv", changed("conv", feature=(torch.zeros(20, 12, 2, 2), B)), ["(20, 12, 2, 2)", "4, 4)"]),
    ("norm bias", "linear", changed("linear", feature_norm=(torch.ones(12), torch.zeros(11))), ["(11,)", "(12,)"]),
    ("condition", "identity", changed("identity", condition=(torch.zeros(20, 40), B)), ["(20, 40)", "(20, 20)"]),
    ("condition bias", "identity", changed("identity", condition=(torch.zeros(20, 20), B[1:])), ["(19,)", "(20,)"]),
    ("condition norm", "identity", changed("identity", condition_norm=(B[1:], B)), ["(19,)", "(20,)"]),
    ("dtypes", "linear", changed("linear", feature=(W.bfloat16(), B.bfloat16())), ["bfloat16", "float32"]),
    ("devices", "linear", changed("linear", feature=(W.to("meta"), B.to("meta"))), ["meta", "cpu"]),
]


@pytest.mark.parametrize("form, given, named", [row[1:] for row in FOLDS], ids=[row[0] for row in FOLDS])
def test_folds(form, given, named):
    refuses(lambda: fold_projector(form, **given), ValueError, named)


@each_backend
def test_trained_projector(backend):
    params = parameters("linear", HIDDEN, CHANNELS)
    for name in params:
        for index in (0, 1):
            trained = {key: list(pair) for key, pair in params.items()}
            trained[name][index] = trained[name][index].clone().requires_grad_()
            projector = fold_projector("linear", **trained)
            refuses(
                partial(control_cross_attention, **call(projector=projector), backend=backend), ValueError, ["no_grad"]
            )
