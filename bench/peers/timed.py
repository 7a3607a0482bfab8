"""What every engine is asked for its times, with the same clock around it. Imports nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


class Timed:
    """One conversation; a call forgets what the one before appended."""

    def append(self, ids: Sequence[int], behind: int) -> float:
        """Return the seconds to append the ids behind the first `behind` tokens, logits of the last included."""
        self._forget(behind)
        begin = time.perf_counter()
        self._step(ids)
        return time.perf_counter() - begin

    def decode(self, ids: Sequence[int], behind: int) -> float:
        """Return the seconds a token of the ids fed one by one, each with the largest logit behind it."""
        self._forget(behind)
        begin = time.perf_counter()
        for token in ids:
            self._step([token]).argmax()
        return (time.perf_counter() - begin) / len(ids)

    def _forget(self, behind: int) -> None:
        """Keep the first `behind` tokens alone."""
        raise NotImplementedError

    def _step(self, ids: Sequence[int]) -> Any:
        """Feed tokens and return the logits of the last, [vocab], of an array that has `argmax`."""
        raise NotImplementedError
