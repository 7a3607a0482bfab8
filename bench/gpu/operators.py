"""The operators by graph replay, on every backend, against eager PyTorch and a copy of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import TOLERANCES, require_close
from bench.cases.append import SECTIONS, Buffers
from bench.cases.roi import Problem
from bench.gpu import DEVICE, REHEARSAL, record
from bench.gpu.timing import device_seconds, graph_of
from bench.workloads import DOCUMENT, LMS, PHOTO, Append, Roi
from vpt_kernels import append_visual_kv_, control_cross_attention, fold_projector, roi_patch_embed
from vpt_kernels.backends import BackendUnavailable

BACKENDS = ("cpp",) if REHEARSAL else ("triton", "cuda")
CALLS = 1 if REHEARSAL else 200
"""In one graph: enough that its launch does not count, over buffers in turn so that inputs come from memory."""
DTYPE = "float32" if REHEARSAL else "bfloat16"


@dataclass
class Case:
    """One operator at one size. bytes: that it has to move. written: what a call that returns nothing wrote."""

    name: str
    ours: Callable[[str], Tensor | None]
    eager: Callable[[], Tensor]
    bytes: int
    tolerance: float
    written: Callable[[], Tensor] | None = None


def append() -> Iterator[Case]:
    for tokens in (1, 54) if REHEARSAL else (1, 54, 270, 4096):
        b = Buffers(Append(tokens, "2b", DTYPE, capacity=max(1024, tokens)), DEVICE)

        def ours(backend: str, b: Buffers = b) -> None:
            append_visual_kv_(
                b.q, b.k, b.v, b.table, b.positions, b.slots, b.k_cache, b.v_cache, SECTIONS, backend=backend
            )

        def written(b: Buffers = b) -> Tensor:
            return torch.cat(b.stored())

        moved = 2 * (b.q.nbytes + b.k.nbytes + b.v.nbytes)
        yield Case(f"append, {tokens} tokens", ours, b.eager, moved, TOLERANCES[DTYPE], written)


def control() -> Iterator[Case]:
    hidden, dtype = LMS["2b"].hidden, getattr(torch, DTYPE)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=DEVICE) / scale).to(dtype)

    condition = {
        "condition_norm": (normal(hidden), normal(hidden)),
        "condition": (normal(hidden, hidden, scale=hidden**0.5), normal(hidden)),
    }
    linear = {"feature_norm": (normal(1024), normal(1024)), "feature": (normal(hidden, 1024, scale=32), normal(hidden))}
    for form, width, extra in (("identity", hidden, {}), ("linear", 1024, linear)):
        projector = fold_projector(form, **condition, **extra)
        for images in (1, 16):
            x, state = normal(images, 256, width), normal(images, hidden)

            def call(backend: str, x: Tensor = x, state: Tensor = state, projector: object = projector) -> Tensor:
                return control_cross_attention(x, state, projector, backend=backend)

            moved = x.nbytes + x[..., 0].numel() * hidden * x.itemsize
            moved += sum(t.nbytes for t in projector.tensors() if t is not None)
            yield Case(
                f"control, {form}, {images}×256", call, lambda call=call: call("reference"), moved, TOLERANCES[DTYPE]
            )


def roi() -> Iterator[Case]:
    for image, regions in ((PHOTO, 1),) if REHEARSAL else ((PHOTO, 1), (DOCUMENT, 16)):
        problem = Problem(Roi(*image, regions, DTYPE, longest_edge=512, new_geometry=False), DEVICE)
        boxes = problem.boxes()
        plan = problem.plan(boxes)

        def ours(backend: str, problem: Problem = problem, plan: object = plan) -> Tensor:
            return roi_patch_embed([problem.image], plan, problem.embed, backend=backend)

        moved = problem.crop_bytes(boxes) + problem.embed.weight.nbytes + plan.rows * 1280 * problem.dtype.itemsize

        def eager(problem: Problem = problem, boxes: list = boxes) -> Tensor:
            return problem.interpolate(boxes)

        yield Case(f"roi, {regions} of {image[0]}×{image[1]}", ours, eager, moved, 3e-2)


@torch.inference_mode()
def main() -> None:
    for make in (append, control, roi):
        for case in make():
            for backend in BACKENDS:
                try:
                    measure(case, backend)
                except BackendUnavailable as error:
                    record("operator", call=case.name, backend=backend, absent=str(error))
                except Exception as error:  # noqa: BLE001  (the next backend is still worth its time)
                    record("operator", call=case.name, backend=backend, wrong=f"{type(error).__name__}: {error}"[:500])


def measure(case: Case, backend: str) -> None:
    """Check, then time ours, eager PyTorch and a copy of as many bytes, each as one graph."""
    torch.manual_seed(0)
    expected, found = case.eager(), case.ours(backend)
    if case.written is not None:
        found = case.written()
        case.eager()
        expected = case.written()
    require_close(f"{case.name} on {backend}", found, expected, case.tolerance)
    source = torch.zeros(max(16, case.bytes // 2), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    calls = {"ours": lambda: case.ours(backend), "eager": case.eager, "copy": lambda: target.copy_(source)}
    seconds = {name: device_seconds(graph_of(call, CALLS))[0] / CALLS for name, call in calls.items()}
    microseconds = {name: one * 1e6 for name, one in seconds.items()}
    of_copy = seconds["copy"] / seconds["ours"]
    record("operator", call=case.name, backend=backend, dtype=DTYPE, us=microseconds, of_copy=of_copy)


if __name__ == "__main__":
    main()
