"""Times one case in pairs and turns it into a row: plain data for JSON, tables and charts."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from bench.budget import SAMPLING
from bench.cases import Case, WrongResult
from bench.report import is_ceiling
from bench.rooflines import Ceilings, Work
from bench.timers import (
    FEWEST_ROUNDS,
    Ratio,
    Repeated,
    clock,
    host_microseconds,
    median_interval,
    paired_ratio,
    prepare,
)

ROUNDS = (FEWEST_ROUNDS, 101)

Row = dict[str, Any]


def wrong_row(case: Case, error: Exception) -> Row:
    """Return a row that was not timed, because a result was wrong or there was none."""
    return _identity(case) | {"wrong": str(error) if isinstance(error, WrongResult) else repr(error)}


def _identity(case: Case) -> Row:
    return {"name": case.name, "op": case.op, "shape": case.shape, "dtype": case.dtype, "device": case.device}


def _seconds_of(call: Callable[[], object]) -> float:
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    return time.perf_counter() - begin


def _rounds(seconds: float, of_one: float) -> int:
    """Return as many rounds as fit into `seconds`, within `ROUNDS`."""
    return min(ROUNDS[1], max(ROUNDS[0], int(seconds / of_one)))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep garbage collection out of timed calls; pytest-benchmark keeps it from ours only."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(case: Case, benchmark: Any, seconds: float = SAMPLING) -> Row:
    """Check `case`, time it in rounds through pytest-benchmark's `benchmark` fixture, and return the row.

    Every round times each alternative first, beginning with another one each time, and ours last. The fixture's timer
    must be `clock(case.device)`. seconds: for all rounds; where the fewest that bound a median take longer, those.

    Raises:
        WrongResult: ours or an alternative gives another result; nothing was timed.
    """
    checked = _seconds_of(case.check)
    absent = {name: calls for name, calls in case.alternatives.items() if isinstance(calls, str)}
    # Calls that time themselves take seconds, were warmed up by the check, and are no kernels to be put into a graph.
    device, warm_up = "cpu" if case.self_timed else case.device, not case.self_timed
    ours = prepare(case.ours, device, warm_up, case.capture)
    others = {
        name: prepare(calls, device, warm_up, case.capture)
        for name, calls in case.alternatives.items()
        if name not in absent
    }
    now = clock(case.device)
    series: dict[str, list[float]] = {name: [] for name in others}
    own: list[float] = []

    def timed(unit: Repeated) -> float:
        begin = now()
        result = unit.call()
        return result if case.self_timed else now() - begin

    def time_others() -> None:
        names = list(others)
        turn = len(series[names[0]]) % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            series[name].append(timed(others[name]) / others[name].count)

    # A check runs every call once; of calls that take seconds, no further round is spent on learning how long.
    one = checked if case.self_timed else _seconds_of(lambda: [unit.call() for unit in (ours, *others.values())])
    rounds = _rounds(seconds, one)
    begin = time.perf_counter()
    with _no_collections():
        if case.self_timed:
            benchmark.pedantic(lambda: own.append(ours.call()), setup=time_others, rounds=rounds, iterations=1)
        else:
            benchmark.pedantic(ours.call, setup=time_others, rounds=rounds, iterations=1)
            own = [total / ours.count / case.calls for total in benchmark.stats.stats.data]
    low, high = median_interval(own)
    row: Row = {
        **_identity(case),
        "rounds": rounds,
        "sampling_s": time.perf_counter() - begin,
        "graph": ours.graph,
        "ours_ms": statistics.median(own) * 1e3,
        "ours_low": low * 1e3,
        "ours_high": high * 1e3,
        "work": asdict(case.work) if case.work else None,
        "host_us": host_microseconds(case.ours[0], device) if device == "cuda" else None,
        "workspace": case.workspace,
        **({"sweep": asdict(case.sweep)} if case.sweep else {}),
        **({"timeline": case.timeline()} if case.timeline else {}),
        "alternatives": {},
    }
    for name in case.alternatives:
        if name in absent:
            row["alternatives"][name] = {"absent": absent[name]}
            continue
        ratio = paired_ratio(series[name], own)
        row["alternatives"][name] = {
            "ms": statistics.median(series[name]) * 1e3,
            "graph": others[name].graph,
            **asdict(ratio),
        }
    benchmark.extra_info.update(row)
    return row


def merge(suites: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return one result of the suites' results, each of one or several processes that measured the same rows.

    Where memory lies and who the neighbours are changes from process to process more than from round to round: times
    and ratios become medians over the processes, and an interval spans all of theirs. A row is wrong if it was once,
    or if a process lacks it. Every row is judged by the best rates that any process reached.
    """
    runs = [run for suite in suites for run in suite]
    ceilings = Ceilings.best_of([run["ceilings"] for run in runs])
    rows = []
    for suite in suites:
        found: dict[str, list[Row]] = {}
        for row in (row for run in suite for row in run["rows"]):
            found.setdefault(row["name"], []).append(row)
        rows += [_merge_row(same, len(suite), ceilings) for same in found.values()]
    environment = runs[0]["environment"] | {"processes": max(len(suite) for suite in suites)}
    return {"environment": environment, "ceilings": ceilings.as_dict(), "rows": rows}


def _merge_row(rows: list[Row], processes: int, ceilings: Ceilings) -> Row:
    row = next((row for row in rows if "wrong" in row), None) or dict(rows[0])
    if len(rows) != processes:
        row["wrong"] = f"only {len(rows)} of {processes} processes measured it"
    if "wrong" in row:
        return row
    seconds = statistics.median(row["ours_ms"] for row in rows) / 1e3
    row |= {
        "ours_ms": seconds * 1e3,
        "ours_low": min(row["ours_low"] for row in rows),
        "ours_high": max(row["ours_high"] for row in rows),
        "processes": processes,
    }
    if row["host_us"] is not None:
        row["host_us"] = statistics.median(row["host_us"] for row in rows)
    if all("setup_s" in row for row in rows):
        row["setup_s"] = statistics.median(row["setup_s"] for row in rows)
    for name in row["alternatives"]:
        others = [row["alternatives"][name] for row in rows]
        if "absent" in others[0]:
            continue
        low, high = min(other["low"] for other in others), max(other["high"] for other in others)
        ratio = Ratio(statistics.median(other["ratio"] for other in others), low, high)
        milliseconds = statistics.median(other["ms"] for other in others)
        row["alternatives"][name] = others[0] | {"ms": milliseconds, **asdict(ratio), "noisy": ratio.noisy}
    if row["work"] is not None:
        row |= judge(row, ceilings)
    return row


def judge(row: Row, ceilings: Ceilings) -> Row:
    """Return a merged row's rates and its share of the roofline.

    Where an alternative does nothing but a part of the work, its time in the same rounds bounds the row too: a shared
    machine's bandwidth changes from minute to minute.
    """
    work, seconds = Work(**row["work"]), row["ours_ms"] / 1e3
    floor = ceilings.floor(work, row["dtype"])
    bound = "bytes" if floor == ceilings.moving(work) else "operations"
    parts = [other["ms"] / 1e3 for name, other in row["alternatives"].items() if is_ceiling(name) and "ms" in other]
    floor = min([floor, *parts])
    return {
        "GB_per_s": work.bytes / seconds / 1e9,
        "TFLOP_per_s": work.flops / seconds / 1e12,
        "bound": bound,
        "floor_ms": floor * 1e3,
        "roofline": floor / seconds,
    }
