"""Which cases of long test functions `make test` leaves to `make test-long`, so that it takes minutes.

    PYTEST_ADDOPTS="--durations=0 --durations-min=0.05" make test test-long >LOG && python -m tests.durations LOG

`durations.txt` records, compiled and on Triton's interpreter, each function that took longer than SHARE: its seconds
and its cases. Of these as many cases as take SHARE stay, evenly spread; the others are marked `long`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("durations.txt")
SHARE = 2.0
"""Seconds for all cases of a function."""
MODES = ("compiled", "interpreted")


def recorded(mode: str) -> dict[str, float]:
    """Seconds a case, of each long function."""
    lines = [line.split(maxsplit=3) for line in RECORD.read_text().splitlines()]
    return {name: float(seconds) / int(cases) for kind, seconds, cases, name in lines if kind == mode}


def function(nodeid: str) -> str:
    return nodeid.split("[")[0]


def long(items: list[pytest.Item], mode: str) -> list[pytest.Item]:
    """The collected cases that do not stay."""
    cases, left = defaultdict(list), []
    for item in items:
        cases[function(item.nodeid)].append(item)
    for name, seconds in recorded(mode).items():
        found = cases.get(name, [])
        kept = min(len(found), int(SHARE / seconds))
        spread = {index * len(found) // kept for index in range(kept)}
        left += [item for index, item in enumerate(found) if index not in spread]
    return left


def measured(report: str) -> dict[str, tuple[float, int]]:
    """Of each function that a report of pytest's durations names: its seconds and its cases."""
    seconds, cases = Counter(), defaultdict(set)
    for took, nodeid in re.findall(r"^([\d.]+)s (?:call|setup|teardown) +(\S.*)$", report, flags=re.MULTILINE):
        seconds[function(nodeid)] += float(took)
        cases[function(nodeid)].add(nodeid)
    return {name: (seconds[name], len(cases[name])) for name in seconds}


def main(log: str) -> None:
    """Write durations.txt anew from a log: of each `make`, the compiled half reports first."""
    reports: dict[str, str] = dict.fromkeys(MODES, "")
    for index, report in enumerate(
        re.split(r"^=+ slowest durations =+$", Path(log).read_text(), flags=re.MULTILINE)[1:]
    ):
        reports[MODES[index % 2]] += report
    lines = []
    for mode in MODES:
        found = sorted(measured(reports[mode]).items())
        lines += [f"{mode} {took:.1f} {cases} {name}" for name, (took, cases) in found if took > SHARE]
    RECORD.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
