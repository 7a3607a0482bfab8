"""One module per operator lives here, which turns a workload into calls of ours and of every alternative, checked
against each other; it may import loops, rooflines, timers, transformers_model and workloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.rooflines import Work
from bench.timers import Call


class WrongResult(AssertionError):
    """A call that is timed must first be right; the message says which one was not, and by how much."""


@dataclass(frozen=True)
class Sweep:
    """Where a row stands in its series."""

    axis: str
    at: int
    series: str


def sweep(op: str, workload: Any) -> Sweep | None:
    """Return the series of a workload along its `sweep`: all rows of the operator that differ in that field only."""
    axis = workload.sweep
    if not axis:
        return None
    hidden = {"quick", "sweep", "capacity", axis, *(("width", "height") if axis == "pixels" else ())}
    fixed = [f"{name} {value}" for name, value in asdict(workload).items() if name not in hidden and value is not None]
    return Sweep(axis, getattr(workload, axis), ", ".join([op, *fixed]))


@dataclass
class Case:
    """One row of a benchmark.

    ours, alternatives: calls that differ in their buffers or geometry only, taken in turn; an alternative that cannot
    run here is the reason instead. check: raises WrongResult unless ours and the alternatives agree. work: what a call
    cannot avoid, or None where nothing simple says it. sweep: the quantity along which a series of rows differs, its
    value, and what the series' rows have in common. timeline: after the timing, milliseconds of every stage, for ours
    ("ours") and every alternative that knows them. workspace: bytes one call of ours needs beside its inputs and
    outputs, or None where it was not measured. calls: of the function in one call of ours. self_timed: every call
    returns the seconds that count, because only a part of it does. capture: whether a CUDA graph may repeat a call; not
    where it must differ from the one before.
    """

    op: str
    shape: str
    dtype: str
    device: str
    ours: Sequence[Call]
    alternatives: dict[str, Sequence[Call] | str]
    check: Callable[[], object]
    work: Work | None
    workspace: int | None = None
    calls: int = 1
    self_timed: bool = False
    sweep: Sweep | None = None
    capture: bool = True
    timeline: Callable[[], dict[str, dict[str, float]]] | None = None

    @property
    def name(self) -> str:
        return f"{self.op} | {self.shape} | {self.dtype}"


def require_close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Return the relative Euclidean distance of two results; NaN is never close."""
    if ours.shape != theirs.shape:
        raise WrongResult(f"{name}: shape {tuple(ours.shape)} against {tuple(theirs.shape)}; a wrong row is not timed")
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    if not error <= tolerance:
        raise WrongResult(f"{name}: relative difference {error:.2e} exceeds {tolerance:.0e}; a wrong row is not timed")


def absent(package: str) -> str | None:
    """Return why an alternative of this package cannot run, or None."""
    return None if find_spec(package) else f"{package} is not installed"


@dataclass(frozen=True)
class Alternative:
    """Another way to do the work of a row. Whoever adds one writes this object in its case's file, and nothing else.

    name: what results and pages call it. description: how it is called; threads and dtype are those of ours.
    make_call: turns the case's problem (its inputs) into the call that is timed. available: says of a problem why the
    alternative cannot run on it, or None. exact: whether its result may differ from ours by rounding only. peer: a
    package of which any release may be installed; without it, or if its call fails, the row names the reason.
    """

    name: str
    description: str
    make_call: Callable[[Any], Callable[..., Any]]
    available: Callable[[Any], str | None] = lambda problem: None
    exact: bool = True
    peer: str | None = None

    def calls(self, problems: Sequence[Any], *arguments: Any) -> list[Any] | str:
        """Return the call on each of a row's problems, which differ in their buffers only, or why there is none.

        arguments: what a call takes; a peer's is tried with them.
        """
        if reason := self.available(problems[0]) or (absent(self.peer) if self.peer else None):
            return reason
        if self.peer is None:
            return [self.make_call(problem) for problem in problems]
        try:
            calls = [self.make_call(problem) for problem in problems]
            calls[0](*arguments)
            return calls
        except Exception as error:  # noqa: BLE001  (another release of a package must not cost us the row)
            return f"{self.peer} does not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}"


def has_onednn(problem: Any) -> str | None:
    """Return why a float32 product on a CPU cannot go through oneDNN, or None; for `Alternative.available`."""
    if problem.device != "cpu" or problem.workload.dtype != "float32":
        return "for float32 on a CPU, where torch takes MKL"
    return None if torch.backends.mkldnn.is_available() else "this torch has no oneDNN"


def workspace(call: Call, device: str, outputs: int) -> int | None:
    """Return the peak bytes that a call of ours takes from torch's allocator beyond its `outputs`.

    None on a CPU, where libraries take their buffers from malloc and nothing counts them.
    """
    if device == "cpu":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return max(0, torch.cuda.max_memory_allocated() - before - outputs)


def smooth_pixels(height: int, width: int) -> np.ndarray:
    """Return uint8 [height, width, 3] without detail: who takes another tap here and there is still recognised as
    right.
    """
    coarse = torch.from_numpy(np.random.default_rng(0).random((1, 3, 12, 16), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return np.ascontiguousarray((smooth * 255).byte().permute(1, 2, 0).numpy())


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run `F.linear` in float32 on a CPU through oneDNN, where torch takes MKL; its sums are less exact."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` under torch.compile as `COMPILED` says, one wrapper for all buffers of a row."""
    return torch.compile(function, fullgraph=True)


COMPILED = "the eager composition, fullgraph (control, append), default mode, inductor; compiled per row"
"""How every case calls torch.compile."""
