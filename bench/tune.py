"""Measures launches of the Triton kernels on this GPU and keeps the fastest in `vpt_kernels/tuned.json`.

    python -m bench.tune [--kernel NAME] [--rounds N] [--write FILE]

Every candidate is first checked against the launch that the kernel's own table names, then timed in turn with it, as
the benchmarks are: replayed graphs over rotating buffers. One that is not faster by more than MARGIN, with certainty,
is not worth a line: the tables beside the kernels hold their reasons, a tuned line only its measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import gpu
from bench.cases import TOLERANCES, WrongResult, require_close
from bench.cases.append import SECTIONS, Buffers
from bench.cases.roi import Problem
from bench.timers import FEWEST_ROUNDS, Ratio, clock, paired_ratio, prepare
from bench.workloads import DOCUMENT, LMS, PHOTO, Append, Roi
from vpt_kernels import append_visual_kv, control_cross_attention, fold_projector, roi_patch_embed
from vpt_kernels.launch import TUNED, TUNED_FILE, capability

MARGIN = 1.02
Launch = tuple[int, ...]
Calls = Sequence[Callable[[], tuple[Tensor, ...]]]
"""Calls that differ in their buffers only and return what they have written."""


@dataclass(frozen=True)
class Question:
    """Which launch suits `kernel` for a size class: representative calls and what might do better than the table."""

    kernel: str
    size: str
    dtype: str
    calls: Callable[[str], Calls]
    candidates: tuple[Launch, ...]


def _append(most: int) -> Callable[[str], Calls]:
    def calls(device: str) -> Calls:
        # The interpreter takes a second for what a GPU does in microseconds.
        tokens = min(most, 2) if device == "cpu" else most
        workload = Append(tokens, "2b", "bfloat16", capacity=max(1024, tokens))
        buffers = [Buffers(workload, device) for _ in range(max(2, min(8, 4096 // tokens)))]

        def call(b: Buffers) -> tuple[Tensor, ...]:
            arguments = (b.q, b.k, b.v, b.table, b.positions, b.slots, b.k_cache, b.v_cache, SECTIONS)
            return append_visual_kv(*arguments, backend="triton"), b.k_cache, b.v_cache

        return [lambda b=b: call(b) for b in buffers]

    return calls


def _control(form: str, images: int, tokens: int, dtype: str, lm: str = "2b") -> Callable[[str], Calls]:
    def calls(device: str) -> Calls:
        hidden = LMS[lm].hidden

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) / scale).to(getattr(torch, dtype))

        condition = {
            "condition_norm": (normal(hidden), normal(hidden)),
            "condition": (normal(hidden, hidden, scale=hidden**0.5), normal(hidden)),
        }
        feature = {}
        if form != "identity":
            feature = {
                "feature_norm": (normal(1024), normal(1024)),
                "feature": (normal(hidden, 1024, scale=32), normal(hidden)),
            }
        projector = fold_projector(form, **condition, **feature)
        width = hidden if form == "identity" else 1024
        inputs = [(normal(images, tokens, width), normal(images, hidden)) for _ in range(3)]
        return [lambda f=f, c=c: (control_cross_attention(f, c, projector, backend="triton"),) for f, c in inputs]

    return calls


def _roi(image: tuple[int, int], regions: int, dtype: str) -> Callable[[str], Calls]:
    def calls(device: str) -> Calls:
        problem = Problem(Roi(*image, regions, dtype, longest_edge=512, new_geometry=False), device)
        boxes = problem.boxes()
        return [lambda: (roi_patch_embed([problem.image], problem.plan(boxes), problem.embed, backend="triton"),)]

    return calls


def _attention(tokens: int) -> Callable[[str], Calls]:
    """Return the 2B's attention late in a conversation, whose keys are read once."""

    def calls(device: str) -> Calls:
        lm = LMS["2b"]
        capacity, past = (256, 150) if device == "cpu" else (4096, 2000)

        def normal(count: int, heads: int) -> Tensor:
            return torch.randn(count, heads, lm.head_dim, device=device).bfloat16()

        def one() -> Callable[[], tuple[Tensor, ...]]:
            from vpt_model.network.attention_triton import attend

            places = [torch.tensor([n], dtype=torch.int32, device=device) for n in (0, past, tokens)]
            inputs = (normal(tokens, lm.heads)[None], normal(capacity, lm.kv_heads), normal(capacity, lm.kv_heads))
            return lambda: (attend(*inputs, *places, capacity),)

        return [one() for _ in range(8)]

    return calls


QUESTIONS = (
    Question("append_kernel", "few tokens", "bfloat16", _append(54), ((1, 1), (1, 2), (2, 1), (2, 2))),
    Question("append_kernel", "some tokens", "bfloat16", _append(270), ((1, 1), (2, 2), (4, 2), (4, 4))),
    Question("append_kernel", "many tokens", "bfloat16", _append(4096), tuple(product((4, 8, 16), (2, 4, 8)))),
    *(
        Question("condition_kernel", size, "bfloat16", _control("identity", images, 252, "bfloat16"), candidates)
        for size, images, candidates in (
            ("one image", 1, tuple((1, n, k, w) for n, k, w in product((4, 8, 16), (256, 512, 1024), (4, 8)))),
            ("images", 16, tuple((i, n, 256, 4) for i, n in product((2, 4, 8), (2, 4, 8)))),
        )
    ),
    Question(
        "identity_kernel",
        "narrow",
        "bfloat16",
        _control("identity", 16, 252, "bfloat16"),
        tuple(product((1, 2, 4), (2, 4, 8))),
    ),
    Question(
        "identity_kernel",
        "wide",
        "bfloat16",
        _control("identity", 16, 252, "bfloat16", "7b"),
        tuple(product((1, 2), (4, 8, 16))),
    ),
    *(
        Question("project_kernel", size, dtype, _control("linear", images, 256, dtype), candidates)
        for size, images, dtype, candidates in (
            (
                "few tokens",
                1,
                "bfloat16",
                tuple((m, n, k, 4, s) for m, n, k, s in product((32, 64), (32, 64), (64, 128), (2, 3, 4))),
            ),
            (
                "many tokens",
                16,
                "bfloat16",
                (
                    (64, 128, 64, 4, 3),
                    (64, 128, 64, 8, 4),
                    (128, 64, 64, 4, 3),
                    (128, 128, 32, 8, 4),
                    (128, 128, 64, 8, 4),
                    (128, 256, 64, 8, 3),
                ),
            ),
            ("short steps", 1, "float32", ((32, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 16, 4, 3))),
        )
    ),
    Question(
        "resample_kernel",
        "all",
        "bfloat16",
        _roi(DOCUMENT, 4, "bfloat16"),
        ((16, 32, 4), (32, 32, 4), (32, 16, 8), (32, 64, 8), (64, 32, 8)),
    ),
    Question(
        "embed_kernel",
        "few rows",
        "bfloat16",
        _roi(PHOTO, 1, "bfloat16"),
        tuple((m, n, 64, 4, s) for m, n, s in product((32, 64), (64, 128), (3, 4, 5))),
    ),
    Question(
        "embed_kernel",
        "many rows",
        "bfloat16",
        _roi(DOCUMENT, 16, "bfloat16"),
        ((64, 128, 64, 4, 3), (128, 64, 64, 4, 4), (128, 128, 32, 8, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
    ),
    Question(
        "embed_kernel",
        "float32",
        "float32",
        _roi(PHOTO, 1, "float32"),
        ((32, 64, 32, 4, 3), (64, 64, 32, 8, 3), (64, 128, 32, 8, 3), (128, 64, 32, 8, 3)),
    ),
    Question(
        "split_kernel",
        "DECODE",
        "bfloat16",
        _attention(1),
        tuple(
            (16, keys, split, warps, 2)
            for keys, split, warps in (
                (64, 128, 4),
                (64, 256, 4),
                (32, 64, 4),
                (32, 32, 4),
                (64, 64, 2),
                (128, 128, 4),
                (128, 256, 8),
            )
        ),
    ),
    Question(
        "split_kernel",
        "APPEND",
        "bfloat16",
        _attention(320),
        tuple((64, 64, split, 8, stages) for split, stages in ((256, 2), (1024, 2), (4096, 2), (512, 3))),
    ),
)
BESIDE = ("split_kernel",)
"""Kernels of the model, which reads no `tuned.json`: a faster launch goes into the table beside the kernel."""


@contextmanager
def launched(architecture: str, kernel: str, size: str, launch: Launch | None) -> Iterator[None]:
    """Make `kernel` use `launch` for this size class inside, or the table beside the kernel if None."""
    if kernel in BESIDE:
        from vpt_model.network import attention_triton

        table = getattr(attention_triton, size)
        with mock.patch.object(attention_triton, size, table if launch is None else type(table)(*launch)):
            yield
        return
    lines = TUNED.setdefault(architecture, {}).setdefault(kernel, {})
    before = lines.pop(size, None)
    if launch is not None:
        lines[size] = list(launch)
    try:
        yield
    finally:
        lines.pop(size, None)
        if before is not None:
            lines[size] = before


def answer(question: Question, device: str, rounds: int) -> Iterator[tuple[Launch, Ratio | str]]:
    """Yield every candidate with its speed relative to the kernel's table, or with the reason why it does not run."""

    def calls() -> Calls:
        torch.manual_seed(0)  # the same inputs, and caches in which nothing stands yet
        return question.calls(device)

    architecture = f"sm_{capability(torch.empty(0, device=device))}"
    where = (architecture, question.kernel, question.size)
    with launched(*where, None):
        expected = calls()[0]()
        default = prepare(calls(), device)
    now = clock(device)
    for launch in question.candidates:
        try:
            # A graph keeps the launch with which it was captured; an eager call looks it up.
            with launched(*where, launch):
                own = calls()
                for result, right in zip(own[0](), expected):
                    require_close(f"{where} {launch}", result, right, TOLERANCES[question.dtype])
                candidate = prepare(own, device)
        except WrongResult:
            raise
        except Exception as error:  # noqa: BLE001  (too much shared memory, too many registers: the next one)
            yield launch, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            continue
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(rounds):
            for series, unit, line in zip(seconds, (default, candidate), (None, launch)):
                with launched(*where, line):
                    begin = now()
                    unit.call()
                    series.append((now() - begin) / unit.count)
        yield launch, paired_ratio(*seconds)


def best(answers: Sequence[tuple[Launch, Ratio | str]]) -> Launch | None:
    """Return the fastest candidate that beats the table by MARGIN with certainty, if any."""
    faster = [(ratio.ratio, launch) for launch, ratio in answers if isinstance(ratio, Ratio) and ratio.low > MARGIN]
    return max(faster)[1] if faster else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=sorted({question.kernel for question in QUESTIONS}))
    parser.add_argument("--rounds", type=int, default=21, help=f"in turn, per candidate; at least {FEWEST_ROUNDS}")
    parser.add_argument("--write", type=Path, default=TUNED_FILE, help="default: %(default)s")
    parser.add_argument("--size", help="only this size class of the kernel")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then the candidates so far are judged")
    parser.add_argument("--record", action="store_true", help="a line of `make gpu`'s results instead of --write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds {options.rounds} is too few to compare by; give at least {FEWEST_ROUNDS}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.tune: torch sees no CUDA device; launches can only be measured on a GPU", file=sys.stderr)
        return 2
    console, architecture = Console(), f"sm_{capability(torch.empty(0, device=options.device))}"
    end = time.monotonic() + options.seconds
    for question in QUESTIONS:
        if options.kernel not in (None, question.kernel) or options.size not in (None, question.size):
            continue
        table = Table("launch", "times as fast as the table", title=f"{question.kernel}, {question.size}")
        answers = []
        for launch, ratio in answer(question, options.device, options.rounds):
            answers.append((launch, ratio))
            cell = f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if isinstance(ratio, Ratio) else ratio
            table.add_row(str(launch), cell)
            if time.monotonic() > end:
                break
        chosen = best(answers)
        table.caption = f"kept: {chosen or 'the table'}"
        console.print(table)
        if options.record:
            shown = {str(launch): vars(ratio) if isinstance(ratio, Ratio) else ratio for launch, ratio in answers}
            gpu.record(
                "tuned",
                architecture=architecture,
                kernel=question.kernel,
                size=question.size,
                chosen=chosen,
                of=len(question.candidates),
                answers=shown,
            )
        elif question.kernel not in BESIDE:
            keep(architecture, question.kernel, question.size, chosen, options.write)
    return 0


def keep(architecture: str, kernel: str, size: str, launch: Launch | None, path: Path) -> None:
    """Write one line (None: remove it) at once, so that an interrupted run keeps what it measured."""
    tables = json.loads(path.read_text()) if path.exists() else {}
    lines = tables.setdefault(architecture, {}).setdefault(kernel, {})
    lines.pop(size, None)
    if launch is not None:
        lines[size] = list(launch)
    tables = {
        name: {k: v for k, v in kernels.items() if v} for name, kernels in tables.items() if any(kernels.values())
    }
    path.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
