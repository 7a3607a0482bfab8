"""A logits processor of vLLM by which a model "generates" what a request gives, and goes on by itself behind it.

For random weights, which ask for no look: tests script odd turns, the benchmark the turns of its load.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from vpt_model.vllm.options import MAX_LOOKS, SLOT

SCRIPT, NAME = "script", "script_name"
"""In a request's extra arguments: ids that are sampled first, whatever the round; and the request's own name."""
PLAYED: dict[str, int] = {}
"""How much of each script has been sampled."""


class Scripted(LogitsProcessor):
    """Works with the first version of the model runner, which the CPU has."""

    def __init__(self, *_: Any) -> None:
        self.rows: dict[int, tuple[str, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.rows, batch_update, self._script)

    def apply(self, logits: Tensor) -> Tensor:
        for row, (name, script) in self.rows.items():
            place = PLAYED.get(name, 0)
            PLAYED[name] = place + 1
            if place < len(script):
                logits[row] = float("-inf")
                logits[row, script[place]] = 1e4
        return logits

    @staticmethod
    def _script(params: Any, *_: Any) -> tuple[str, list[int]] | None:
        extra = params.extra_args or {}
        # What is sampled behind a captured state counts only where no look is left.
        unused = SLOT in extra and extra.get(MAX_LOOKS, 1) != 0
        return None if SCRIPT not in extra or unused else (extra[NAME], extra[SCRIPT])
