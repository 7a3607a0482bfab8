"""Rows whose calls take made-up time."""

from __future__ import annotations

from typing import Any

from bench.cases import Case
from bench.rooflines import Work
from tests.helpers import numbers


class Pedantic:
    """What `measure` uses of pytest-benchmark's fixture, without its report."""

    def __init__(self) -> None:
        self.stats, self.extra_info = self, {}
        self.data: list[float] = []
        self.calls = 0

    def pedantic(self, function: Any, setup: Any, rounds: int, iterations: int) -> None:
        self.stats = type("Stats", (), {"stats": self})
        for _ in range(rounds):
            setup()
            begin = TIME.now
            function()
            self.data.append(TIME.now - begin)
            self.calls += 1


class VirtualTime:
    """A clock that only the made-up calls move, each by its seconds and up to 5 % more."""

    def __init__(self) -> None:
        self.now, self.noise = 0.0, numbers("virtual time")

    def call(self, seconds: float) -> Any:
        def pass_time() -> None:
            self.now += seconds * (1 + 0.05 * self.noise.random())

        return pass_time


TIME = VirtualTime()


def case(ours: float = 1e-3, check: Any = lambda: None, **others: float) -> Case:
    calls = {name: [TIME.call(seconds)] for name, seconds in others.items()}
    return Case("append_visual_kv", "made up", "float32", "cpu", [TIME.call(ours)], calls, check, Work(1 << 20, 0))
