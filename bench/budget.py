"""How long a run takes: what its rows cost before they are sampled, and what is left of its minutes for samples."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

SAMPLING = 0.5
"""Seconds of samples of a row where nothing says how long a run may take."""


class Budget:
    """Seconds for the samples of rows that are measured one after the other.

    What a row does not use is left to those behind it.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def share(self, rows: int) -> float:
        """Return the seconds of one of the `rows` that are still to come."""
        return max(0.0, self._end - time.monotonic()) / max(1, rows)


def further_processes(left: float, rows: Iterable[dict[str, Any]], most: int) -> int:
    """Return how many more processes fit into `left` seconds, where one measured `rows` before.

    Each builds, checks and compiles what it times anew, and is worth that only with samples: half of the first's.
    """
    cost = sum(row.get("setup_s", 0.0) + row.get("sampling_s", 0.0) / 2 for row in rows)
    return min(most, int(left / cost)) if cost else most


def expected_setup(results: Iterable[dict[str, Any]], flops: float) -> float | None:
    """Return seconds that one process of each suite spends beside samples, by the first result that knows; None if none
    does.

    results: of this machine first. flops: float32 operations a second here; another machine's seconds are scaled by its
    own.
    """
    for result in results:
        known = [row["setup_s"] for row in result["rows"] if "setup_s" in row]
        if known:
            return sum(known) * result["ceilings"]["flops"]["float32"] / flops
    return None
