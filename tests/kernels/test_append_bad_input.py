"""`append_visual_kv` refuses bad input with the caches, and q in place, untouched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import assert_same_bits, each_backend
from tests.kernels.append_inputs import Call, make
from vpt_kernels import rotary_table

TOKENS, ROWS = 7, 50


def good() -> Call:
    return make(TOKENS, (4, 2), 16, table_rows=ROWS, capacity=12)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def cut(name: str, function) -> dict:
    """One argument of the good call, changed."""
    return {name: function(getattr(good(), name))}


def moved(name: str) -> dict:
    return cut(name, lambda t: t.to("meta"))


def trained(name: str) -> dict:
    return cut(name, lambda t: t.clone().requires_grad_())


def position(axis: int, token: int, value: int, dtype: torch.dtype = torch.int64) -> dict:
    positions = good().positions.to(dtype)
    positions[axis, token] = value
    return {"positions": positions}


CALLS = [
    # changes of a good call, error, what the message names
    ("q rank", cut("q", lambda t: t.flatten(1)), ValueError, ["q", "(7, 64)", "3"]),
    ("k rank", cut("k", lambda t: t[None]), ValueError, ["k", "(1, 7, 2, 16)", "3"]),
    ("v rank", cut("v", lambda t: t[0]), ValueError, ["v", "(2, 16)", "3"]),
    ("k tokens", cut("k", lambda t: t[:-1]), ValueError, ["(6, 2, 16)", "(7, 2, 16)"]),
    ("q tokens", cut("q", lambda t: t[:-1]), ValueError, ["(6, 4, 16)", "(7, 2, 16)"]),
    ("q width", cut("q", lambda t: t[..., :-2]), ValueError, ["(7, 4, 14)", "(7, 2, 16)"]),
    ("v width", cut("v", lambda t: t[..., :-2]), ValueError, ["(7, 2, 14)", "(7, 2, 16)"]),
    ("v heads", cut("v", lambda t: t[:, :1]), ValueError, ["(7, 1, 16)", "(7, 2, 16)"]),
    ("query heads", cut("q", lambda t: t[:, :3]), ValueError, ["3 heads", "2"]),
    ("k dtype", cut("k", lambda t: t.bfloat16()), TypeError, ["k", "bfloat16", "float32"]),
    ("v dtype", cut("v", lambda t: t.double()), TypeError, ["v", "float64", "float32"]),
    ("q dtype", cut("q", lambda t: t.bfloat16()), TypeError, ["float32", "bfloat16"]),
    ("q type", cut("q", lambda t: t.numpy()), TypeError, ["q", "ndarray"]),
    ("q device", moved("q"), ValueError, ["meta", "cpu"]),
    ("k device", moved("k"), ValueError, ["k", "meta", "cpu"]),
    ("q stride", cut("q", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)), ValueError, ["q", "contiguous"]),
    ("k stride", cut("k", lambda t: t.repeat_interleave(2, -1)[..., ::2]), ValueError, ["k", "contiguous"]),
    ("v stride", cut("v", lambda t: t[..., :1].expand(-1, -1, 16)), ValueError, ["v", "contiguous"]),
    ("q gradient", trained("q"), ValueError, ["q", "no_grad"]),
    ("k gradient", trained("k"), ValueError, ["k", "no_grad"]),
    ("v gradient", trained("v"), ValueError, ["v", "no_grad"]),
    ("table gradient", trained("cos_sin"), ValueError, ["cos_sin", "no_grad"]),
    ("cache gradient", trained("k_cache"), ValueError, ["k_cache", "no_grad"]),
    ("table dtype", cut("cos_sin", lambda t: t.bfloat16()), TypeError, ["cos_sin", "bfloat16", "float32"]),
    ("table of doubles", cut("cos_sin", lambda t: t.double()), TypeError, ["cos_sin", "float64", "float32"]),
    ("table rank", cut("cos_sin", lambda t: t[0]), ValueError, ["cos_sin", "(16,)", "2"]),
    ("table stride", cut("cos_sin", lambda t: t.T.contiguous().T), ValueError, ["cos_sin", "contiguous"]),
    ("table device", moved("cos_sin"), ValueError, ["cos_sin", "meta", "cpu"]),
    ("table width", {"cos_sin": rotary_table(ROWS, 14)}, ValueError, ["(2, 3, 3)", "14"]),
    ("table too wide", {"cos_sin": rotary_table(ROWS, 18), "sections": (3, 3, 3)}, ValueError, ["18", "16"]),
    ("section sum", {"sections": (2, 3, 4)}, ValueError, ["(2, 3, 4)", "16"]),
    ("section count", {"sections": (4, 4)}, ValueError, ["(4, 4)", "three"]),
    ("negative section", {"sections": (-1, 4, 5)}, ValueError, ["(-1, 4, 5)"]),
    ("sections of Qwen2-VL", {"sections": (16, 24, 24)}, ValueError, ["(16, 24, 24)", "16"]),
    ("position rows", cut("positions", lambda t: t[:2]), ValueError, ["(2, 7)", "(3, 7)"]),
    ("position columns", cut("positions", lambda t: t[:, 1:]), ValueError, ["(3, 6)", "(3, 7)"]),
    ("positions by token", cut("positions", lambda t: t.T), ValueError, ["(7, 3)", "(3, 7)"]),
    ("position rank", cut("positions", lambda t: t[0]), ValueError, ["positions", "(7,)"]),
    ("position dtype", cut("positions", lambda t: t.float()), TypeError, ["float32", "int32", "int64"]),
    ("position bytes", cut("positions", lambda t: t.to(torch.uint8)), TypeError, ["uint8", "int32"]),
    ("position list", cut("positions", lambda t: t.tolist()), TypeError, ["positions", "list"]),
    ("position device", moved("positions"), ValueError, ["positions", "meta", "cpu"]),
    ("slot count", cut("slots", lambda t: t[1:]), ValueError, ["(6,)", "(7,)"]),
    ("slot rank", cut("slots", lambda t: t[None]), ValueError, ["slots", "(1, 7)"]),
    ("slot dtype", cut("slots", lambda t: t.to(torch.int16)), TypeError, ["int16", "int32", "int64"]),
    ("slot device", moved("slots"), ValueError, ["slots", "meta", "cpu"]),
    ("cache heads", cut("k_cache", lambda t: t[:, :1]), ValueError, ["(12, 1, 16)", "2"]),
    ("cache width", cut("v_cache", lambda t: t[..., :-1]), ValueError, ["(12, 2, 15)", "16"]),
    ("caches differ", cut("v_cache", lambda t: t[:-1]), ValueError, ["(12, 2, 16)", "(11, 2, 16)"]),
    ("one paged", cut("k_cache", lambda t: t.view(4, 3, 2, 16)), ValueError, ["(4, 3, 2, 16)", "(12, 2, 16)"]),
    ("cache rank", {"k_cache": zeros(12, 32), "v_cache": zeros(12, 32)}, ValueError, ["(12, 32)", "capacity"]),
    ("HND", {"k_cache": zeros(4, 2, 3, 16), "v_cache": zeros(4, 2, 3, 16)}, ValueError, ["(4, 2, 3, 16)", "NHD"]),
    ("cache dtype", cut("k_cache", lambda t: t.bfloat16()), TypeError, ["k_cache", "bfloat16", "float32"]),
    ("value dtype", cut("v_cache", lambda t: t.double()), TypeError, ["v_cache", "float64", "float32"]),
    ("cache stride", cut("k_cache", lambda t: t.mT.contiguous().mT), ValueError, ["k_cache", "contiguous"]),
    ("cache device", moved("v_cache"), ValueError, ["v_cache", "meta", "cpu"]),
    ("cache type", cut("k_cache", lambda t: np.asarray(t)), TypeError, ["k_cache", "ndarray"]),
    ("position at the end", position(0, 3, ROWS), ValueError, ["50", "49"]),
    ("position far away", position(1, 6, 1 << 40), ValueError, [str(1 << 40), "49"]),
    ("position below", position(2, 0, -1), ValueError, ["-1", "0"]),
    ("position beyond 32 bits", position(0, 6, (1 << 32) + 3), ValueError, [str((1 << 32) + 3)]),
    ("position below 32 bits", position(2, 6, -(1 << 63)), ValueError, [str(-(1 << 63))]),
    ("position of 32 bits", position(1, 6, (1 << 31) - 1, torch.int32), ValueError, [str((1 << 31) - 1)]),
    ("negative of 32 bits", position(1, 6, -(1 << 31), torch.int32), ValueError, [str(-(1 << 31))]),
    (
        "position of a skipped token",
        {**position(0, 2, ROWS), "slots": torch.full((TOKENS,), -1)},
        ValueError,
        ["50", "49"],
    ),
]


def untouched(call: Call) -> list[torch.Tensor]:
    """What an error must leave alone, as far as this process can read it."""
    tensors = (call.q, call.k, call.v, call.k_cache, call.v_cache)
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.device.type == "cpu"]


@each_backend
@pytest.mark.parametrize("in_place", (False, True), ids=("fresh", "in place"))
@pytest.mark.parametrize("changes, error, named", [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_calls(backend, in_place, changes, error, named):
    call = replace(good(), **changes)
    tensors = untouched(call)
    kept = [t.detach().clone() for t in tensors]
    with pytest.raises(error) as raised:
        call.run_in_place(backend) if in_place else call.run(backend)
    for text in named:
        assert text in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    for tensor, before in zip(tensors, kept, strict=True):
        assert_same_bits(tensor.detach(), before, "a tensor after an error")


@each_backend
@pytest.mark.parametrize("in_place", (False, True), ids=("fresh", "in place"))
@pytest.mark.parametrize("token", (0, 2500, 4095))
def test_one_bad_position_among_many(backend, in_place, token):
    """Found before the first row is written, wherever it is and however the tokens are shared between threads."""
    call = make(4096, (2, 1), 16, table_rows=ROWS, capacity=4096)
    call.positions[1, token] = ROWS
    before = call.fresh()
    with pytest.raises(ValueError, match="50"):
        call.run_in_place(backend) if in_place else call.run(backend)
    for name in ("q", "k_cache", "v_cache"):
        assert_same_bits(getattr(call, name), getattr(before, name), name)


@pytest.mark.parametrize(
    "arguments, named", [((0, 16), ["0"]), ((-1, 16), ["-1"]), ((4, 7), ["7"]), ((4, 0), ["0"]), ((4, -2), ["-2"])]
)
def test_rotary_tables(arguments, named):
    with pytest.raises(ValueError) as raised:
        rotary_table(*arguments)
    for text in named:
        assert text in str(raised.value)
