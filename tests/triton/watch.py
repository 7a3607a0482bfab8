"""What a call on Triton's interpreter launches and allocates, and in which order its programs run."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Launches:
    """Kernels and grids that are launched."""

    def __enter__(self) -> Launches:
        self.grids: list[tuple[str, tuple[int, ...]]] = []
        self.original = original = GridExecutor.__call__

        def launch(executor, *arguments, **named):
            self.grids.append((executor.fn.__name__, tuple(executor.grid)))
            return original(executor, *arguments, **named)

        GridExecutor.__call__ = launch
        return self

    def __exit__(self, *error: object) -> None:
        GridExecutor.__call__ = self.original


class Allocations(TorchDispatchMode):
    """Bytes that torch.empty and its like return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_strided):
            self.bytes.append(result.numel() * result.itemsize)
        return result


def outputs(seen: Allocations) -> list[int]:
    """Without the empty tensors that the interpreter makes of every argument."""
    return [size for size in seen.bytes if size]


class Permuted:
    """The programs of every launch run in an order drawn from `seed`, each of them once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> Permuted:
        self.original = original = InterpreterBuilder.set_grid_idx
        orders: dict[tuple[int, ...], list[int]] = {}

        def place(builder, x, y, z):
            grid = tuple(builder.grid_dim)
            if grid not in orders:
                generator = torch.Generator().manual_seed(self.seed)
                orders[grid] = torch.randperm(grid[0] * grid[1] * grid[2], generator=generator).tolist()
            number = orders[grid][(x * grid[1] + y) * grid[2] + z]
            original(builder, number // (grid[1] * grid[2]), number // grid[2] % grid[1], number % grid[2])

        InterpreterBuilder.set_grid_idx = place
        return self

    def __exit__(self, *error: object) -> None:
        InterpreterBuilder.set_grid_idx = self.original
