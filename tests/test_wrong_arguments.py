"""Every wrong argument of every public callable ends in words of ours: ValueError or TypeError, no error of inside.

For each parameter of each callable of `tests.calls`, one valid call is made with that argument exchanged for wrong
kinds. Either the call refuses it by a `raise` of our own, in a message that says what is wrong, or it takes it.
"""

from __future__ import annotations

import ast
import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.calls import CALLS, made
from vpt_kernels import BackendUnavailable

ROOT = Path(__file__).resolve().parents[1]
OURS = (ROOT / "vpt_kernels", ROOT / "vpt_model")


class Three:
    """What counts as the integer 3 and has no arithmetic."""

    def __index__(self) -> int:
        return 3


def nested(*parts: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor(list(parts))


def quantised(value: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, says torch
        return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)


ANYTHING: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a string": lambda: "wrong",
    "a lone surrogate": lambda: "\ud800",
    "bytes": lambda: b"\x00",
    "a fraction": lambda: 1.5,
    "NaN": lambda: math.nan,
    "infinity": lambda: math.inf,
    "negative": lambda: -1,
    "huge": lambda: 10**30,
    "true": lambda: True,
    "an object": object,
    "an empty list": list,
    "a list of None": lambda: [None],
    "a list of strings": lambda: ["wrong"],
    "a dictionary": lambda: {"wrong": 1},
    "an array": lambda: np.zeros((2, 2)),
    "an array of rank 0": lambda: np.array(3),
    "an index": Three,
    "more digits than Python spells": lambda: 10**5000,
    "a path": lambda: Path("nowhere") / "file",
    "no text": lambda: "",
    "a text that is no name of a file": lambda: "a\0b" + "x" * 300,
    "a view of memory": lambda: memoryview(np.zeros((2, 2))),
    "keys that are no names": lambda: {1: 2},
    "a four-bit type": lambda: torch.float4_e2m1fn_x2,
    "float tensor": lambda: torch.zeros(2, 2),
    "integer tensor": lambda: torch.zeros(3, dtype=torch.int64),
    "rank 0": lambda: torch.tensor(1.0),
    "rank 7": lambda: torch.zeros(1, 1, 1, 1, 1, 1, 1),
    "sparse tensor": lambda: torch.eye(2).to_sparse(),
    "meta tensor": lambda: torch.zeros(2, 2, device="meta"),
    "complex tensor": lambda: torch.zeros(2, 2, dtype=torch.complex64),
    "nested tensor": lambda: nested(torch.zeros(2, 2)),
    "quantised tensor": lambda: quantised(torch.zeros(2, 5)),
}


def derived(value: Any) -> Iterator[tuple[str, Any]]:
    """Wrong forms of a right value."""
    if isinstance(value, Tensor):
        yield "on meta", value.to("meta")
        yield "one rank more", value[None]
        yield "one rank less", value[0]
        yield "sparse", value.to_sparse()
        yield "float16", value.half()
        yield "float64", value.double()
        yield "int8", value.to(torch.int8)
        yield "bool", value.to(torch.bool)
        yield "empty", value[:0]
        yield "nested", nested(*(value if value.dim() else [value]))
        yield "quantised", quantised(value)
        yield "half of it", value[: (len(value) + 1) // 2]
        yield "strided", torch.stack([value, value], -1)[..., 0]
        if value.is_floating_point():
            yield "with NaN", torch.full_like(value, math.nan)
            yield "needs gradients", value.clone().requires_grad_()
        yield "negative", -value if value.dtype != torch.uint8 else value.flip(0)
        yield "large", value * 0 + (100 if value.dtype == torch.uint8 else 10**6)
    elif isinstance(value, (bool, str)):
        yield "an integer", 1
    elif isinstance(value, int):
        for name, wrong in (("half more", value + 0.5), ("as text", str(value)), ("minus", -value), ("zero", 0)):
            yield name, wrong
    elif isinstance(value, (tuple, list)) and value:
        yield "one less", value[:-1]
        yield "one more", [*value, value[-1]]
        for name in ("None", "a string", "NaN", "negative", "huge", "an object", "float tensor", "meta tensor"):
            yield f"with {name} in it", [*value[:-1], ANYTHING[name]()]
        for name, inner in derived(value[-1]):
            yield f"its last {name}", type(value)([*value[:-1], inner])


@lru_cache
def raising_lines(path: str) -> frozenset[int]:
    spans = (n for n in ast.walk(ast.parse(Path(path).read_text())) if isinstance(n, ast.Raise))
    return frozenset(line for n in spans for line in range(n.lineno, (n.end_lineno or n.lineno) + 1))


def verdict(function: Callable[..., Any], given: dict[str, Any]) -> str:
    """ "accepted", "refused", or what came from inside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**given)
    except Exception as error:  # what comes from inside may be anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = any(Path(last.filename).is_relative_to(folder) for folder in OURS)
        expected = isinstance(error, (ValueError, TypeError, BackendUnavailable))
        # The operators' C++ raises a ValueError of its own for what it finds while it reads.
        bound = type(error) is ValueError and Path(last.filename).name == "_ops.py"
        if bound or (expected and ours and last.lineno in raising_lines(last.filename)):
            return "refused" if len(str(error)) > 20 else f"refused without words: {error}"
        words = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__} from {Path(last.filename).name}:{last.lineno}: {words[:90]}"
    return "accepted"


def cases(name: str) -> Iterator[tuple[str, str, Any]]:
    """Parameter, kind and value of every wrong argument."""
    _, given = made(name)
    for parameter in given:
        for kind, make in ANYTHING.items():
            yield parameter, kind, make()
        for kind, value in derived(given[parameter]):
            yield parameter, kind, value


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_ends_inside(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a string is a legal name of a file
    inside = []
    for parameter, kind, wrong in cases(name):
        function, given = made(name)
        found = verdict(function, given | {parameter: wrong})
        if found not in ("accepted", "refused"):
            inside.append(f"{parameter} as {kind}: {found}")
    assert not inside, "\n".join(inside)
