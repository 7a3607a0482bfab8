"""packed_linear against the products of torch's libraries, over as many bytes or more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import TOLERANCES, Alternative, Case, onednn, require_close
from bench.rooflines import product_work
from bench.timers import Call
from bench.workloads import Product
from vpt_kernels import pack_weight, packed_linear

# As in a model, no weight is in a cache when its turn comes again.
ROTATION_BYTES = 256 << 20
INTEGER_TOLERANCE = {"int8": 1e-4, "int4": 1e-4, "w8a8": 2e-2}
"""x is rounded to 16 bits beside weights of integers, to 8 in w8a8."""
GROUP = 32
"""Columns of int4 that share a scale and a minimum."""


class Problem:
    """One weight in every form; x is the same for all that a row rotates through."""

    def __init__(self, workload: Product, x: Tensor, seed: int) -> None:
        self.workload, self.x = workload, x
        generator = torch.Generator().manual_seed(seed)
        shape = (workload.columns, x.shape[1])
        if workload.weights in ("int8", "w8a8"):
            self.integers = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            # Their largest, so that packing finds these integers again.
            self.integers[:, 0] = 127
            self.scales = torch.rand(len(self.integers), 1, generator=generator).add_(0.5).div_(127 * shape[1] ** 0.5)
            self.stored = self.integers * self.scales
        elif workload.weights == "int4":
            groups = (shape[0], shape[1] // GROUP)
            self.integers = torch.randint(0, 16, shape, generator=generator, dtype=torch.int32)
            self.integers[:, ::GROUP], self.integers[:, 1::GROUP] = 0, 15
            self.scales = torch.rand(groups, generator=generator).add_(0.5).div_(15 * shape[1] ** 0.5).half().float()
            self.minima = self.scales.mul(-8).half().float()
            wide = (numbers.repeat_interleave(GROUP, 1) for numbers in (self.scales, self.minima))
            self.stored = self.integers * next(wide) + next(wide)
        else:
            drawn = torch.randn(shape, generator=generator).div_(shape[1] ** 0.5)
            self.stored = drawn.to(getattr(torch, workload.weights))
        self.packed = pack_weight(self.stored, workload.weights)

    def ours(self) -> Tensor:
        return packed_linear(self.x, self.packed)

    def exact(self) -> Tensor:
        return F.linear(self.x.double(), self.stored.double())


def _float32(problem: Problem) -> Call:
    wide = problem.stored.float()
    return lambda: F.linear(problem.x, wide)


def _onednn(problem: Problem) -> Call:
    wide = torch.ops.mkldnn._reorder_linear_weight(problem.stored.float(), problem.workload.rows)
    return lambda: onednn(problem.x, wide)


def _stored(problem: Problem) -> Call:
    x = problem.x.to(problem.stored.dtype)
    return lambda: F.linear(x, problem.stored)


def _int8(problem: Problem) -> Call:
    x, scales = problem.x.bfloat16(), problem.scales.flatten().bfloat16()  # in float32 it takes ten times as long
    return lambda: torch._weight_int8pack_mm(x, problem.integers, scales)


def _int4(problem: Problem) -> Call:
    packed = torch._convert_weight_to_int4pack_for_cpu(problem.integers, 1)
    # It takes 8 from every integer.
    both = torch.stack([problem.scales.t(), (problem.minima + 8 * problem.scales).t()], -1).bfloat16().contiguous()
    x = problem.x.bfloat16()  # in float32 it takes a hundred times as long
    return lambda: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, both)


FLOAT32 = Alternative("F.linear", "torch.nn.functional.linear, the weights' numbers in float32, through MKL", _float32)
ONEDNN = Alternative(
    "oneDNN, packed",
    "mkldnn._linear_pointwise, the weights' numbers in float32, laid out for it before",
    _onednn,
    lambda problem: None if torch.backends.mkldnn.is_available() else "this torch has no oneDNN",
)
STORED = Alternative(
    "F.linear, as stored",
    "torch.nn.functional.linear in the weights' precision, x and the result rounded to it",
    _stored,
    lambda problem: None if problem.workload.weights in ("bfloat16", "float16") else "for weights of 16 bits",
    exact=False,
)
INT8 = Alternative(
    "_weight_int8pack_mm",
    "torch._weight_int8pack_mm, a scale a row; x, the result and scales in bfloat16",
    _int8,
    lambda problem: None if problem.workload.weights in ("int8", "w8a8") else "for weights of 8 bits",
    exact=False,
)
INT4 = Alternative(
    "_weight_int4pack_mm_for_cpu",
    "torch._weight_int4pack_mm_for_cpu; x, the result, scales and minima in bfloat16",
    _int4,
    lambda problem: None if problem.workload.weights == "int4" else "for weights of 4 bits",
    exact=False,
)
ALTERNATIVES = (FLOAT32, ONEDNN, STORED, INT8, INT4)


def build(workload: Product, device: str) -> Case:
    x = torch.randn(workload.rows, workload.features, generator=torch.Generator().manual_seed(0))
    work = product_work(workload)
    problems = [Problem(workload, x, seed) for seed in range(1 + min(15, ROTATION_BYTES // work.bytes))]
    ours = [problem.ours for problem in problems]
    alternatives = {one.name: one.calls(problems) for one in ALTERNATIVES}

    def check() -> None:
        exact = problems[0].exact()
        tolerance = {one.name: TOLERANCES["float32"] for one in ALTERNATIVES}
        tolerance[STORED.name] = TOLERANCES.get(workload.weights, 0.0)
        tolerance[INT8.name] = tolerance[INT4.name] = TOLERANCES["bfloat16"]
        tolerance["ours"] = INTEGER_TOLERANCE.get(workload.weights, TOLERANCES["float32"])
        for name, calls in {"ours": ours, **alternatives}.items():
            if not isinstance(calls, str):
                require_close(f"packed_linear: {name}", calls[0](), exact, tolerance[name])

    return Case(workload.op, workload.shape, workload.dtype, device, ours, alternatives, check, work)
