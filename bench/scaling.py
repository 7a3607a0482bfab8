"""How the cost of a call grows: what a call costs before it works, and from which size on ours is the faster one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import report
from bench.report import Result, is_ceiling


@dataclass(frozen=True)
class Series:
    """Rows of one operator that differ along `axis` only; all lists have one entry a row, in rising order of `sizes`.

    alternatives: milliseconds by name; only those that ran in every row.
    """

    name: str
    axis: str
    sizes: list[int]
    ours: list[float]
    alternatives: dict[str, list[float]]

    @property
    def doubles_at(self) -> int | None:
        """The smallest measured size that costs twice the smallest call: below it, a call is mostly fixed cost."""
        return next((size for size, ms in zip(self.sizes, self.ours) if ms >= 2 * self.ours[0]), None)

    @property
    def grows_by(self) -> float:
        """Exponent of the cost between the two largest sizes: 1 is proportional."""
        (n, m), (a, b) = self.sizes[-2:], self.ours[-2:]
        return math.log(b / a) / math.log(m / n)

    def break_even(self, name: str) -> str:
        """Return where ours and an alternative cost the same, by interpolation between measured sizes."""
        ratios = [theirs / ours for theirs, ours in zip(self.alternatives[name], self.ours)]
        points = list(zip(self.sizes, ratios))
        crossings = [
            f"{'faster' if b > 1 else 'slower'} from {_between(n, a, m, b):.2g}"
            for (n, a), (m, b) in zip(points, points[1:])
            if (a > 1) != (b > 1)
        ]
        return ", ".join(crossings) or f"{'faster' if ratios[0] > 1 else 'slower'} at every size"


def _between(n: int, a: float, m: int, b: float) -> float:
    """Return the size at which a ratio that is `a` at `n` and `b` at `m` is 1, if it follows a power law between
    them.
    """
    n = max(n, 1)
    return n * (m / n) ** (math.log(a) / (math.log(a) - math.log(b)))


def series(result: Result) -> list[Series]:
    """Return all series of at least three rows, in the order of the rows; wrong rows are left out."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "sweep" in row and "wrong" not in row:
            groups.setdefault((row["sweep"]["series"], row["sweep"]["axis"]), []).append(row)
    return [_series(name, axis, rows) for (name, axis), rows in groups.items() if len(rows) >= 3]


def _series(name: str, axis: str, rows: Sequence[dict[str, Any]]) -> Series:
    rows = sorted(rows, key=lambda row: row["sweep"]["at"])
    names = [n for n in rows[0]["alternatives"] if not is_ceiling(n)]
    timed = [n for n in names if all("ms" in row["alternatives"].get(n, {}) for row in rows)]
    return Series(
        name,
        axis,
        [row["sweep"]["at"] for row in rows],
        [row["ours_ms"] for row in rows],
        {n: [row["alternatives"][n]["ms"] for row in rows] for n in timed},
    )


def page(result: Result) -> str:
    """Return the Markdown beside a result: every row, and how the cost grows where rows form a series."""
    grows = f"\n## How the cost grows\n\n{markdown(result)}" if series(result) else ""
    return report.markdown(result) + grows


def markdown(result: Result) -> str:
    """Return one line a series and alternative."""
    lines = [
        "| cost along | sizes | ours at the ends | twice the smallest call from | growth at the end | ours against |",
        "|---|---|---|---|---|---|",
    ]
    for one in series(result):
        against = "; ".join(f"{name}: {one.break_even(name)}" for name in one.alternatives)
        ends = f"{one.ours[0]:.3g} … {one.ours[-1]:.3g} ms"
        sizes = f"{one.sizes[0]} … {one.sizes[-1]} {one.axis}"
        lines.append(
            f"| {one.name} | {sizes} | {ends} | {one.doubles_at or 'never'} | n^{one.grows_by:.2f} | {against} |"
        )
    return "\n".join(lines) + "\n"
