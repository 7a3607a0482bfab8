"""A logits processor of vLLM by which a model "generates" what a request gives, and goes on by itself behind it.

For random weights, which ask for no look: tests script odd turns, the benchmark the turns of its load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from vpt_model.vllm.options import MAX_LOOKS, SLOT

SCRIPT, NAME = "script", "script_name"
"""In a request's extra arguments: ids that are sampled first, whatever the round; and the request's own name."""
PLAYED: dict[str, Played] = {}
"""How far each script has come, by its name: a request leaves the batch and comes back."""


@dataclass
class Played:
    """prompt: tokens before this round. before: sampled in earlier rounds. last: in this one, when last asked."""

    script: list[int]
    prompt: int
    output: list[int]
    before: int = 0
    last: int = 0

    def next(self) -> int | None:
        """Return what is said next; None behind the end. Steps that read a part of a prompt ask for the same again."""
        self.last = len(self.output)
        place = self.before + self.last
        return self.script[place] if place < len(self.script) else None


class Scripted(LogitsProcessor):
    """Works with the first version of the model runner, which the CPU has, in steps that wait for the one before."""

    def __init__(self, *_: Any) -> None:
        self.rows: dict[int, Played] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.rows, batch_update, self._played)

    def apply(self, logits: Tensor) -> Tensor:
        for row, played in self.rows.items():
            if (token := played.next()) is not None:
                logits[row] = float("-inf")
                logits[row, token] = 1e4
        return logits

    @staticmethod
    def _played(params: Any, prompt: list[int], output: list[int]) -> Played | None:
        extra = params.extra_args or {}
        # What is sampled behind a captured state counts only where no look is left.
        unused = SLOT in extra and extra.get(MAX_LOOKS, 1) != 0
        if SCRIPT not in extra or unused:
            return None
        played = PLAYED.setdefault(extra[NAME], Played(extra[SCRIPT], len(prompt), output))
        if len(prompt) > played.prompt:  # another round, behind the token that was asked for last
            played.before, played.last, played.prompt = played.before + played.last + 1, 0, len(prompt)
        played.output = output
        return played
