"""The decode layer for few rows, one Triton file per launch; the README has the mathematics, rounding and bytes.

`layers` chains them, `reference` says the same with PyTorch's operations. Written and interpreted on a CPU and compiled
for sm_80 to sm_120; not yet run on a GPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MOST_ROWS = 8
"""One row of eight channels is the smallest tile of every GPU's tensor cores; more rows are a library's business."""


def serves(x: Tensor) -> bool:
    """Return whether rows [M, H] are few, in a dtype of the kernels and on a GPU that Triton compiles for."""
    return len(x) <= MOST_ROWS and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and on_gpu(x)


def on_gpu(x: Tensor) -> bool:
    """Return whether Triton's kernels take x; on a CPU they are only interpreted, by tests."""
    return x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
