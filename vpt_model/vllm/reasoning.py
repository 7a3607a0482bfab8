"""`--reasoning-parser vpt`: what a model says up to the last perception token is its reasoning, the rest its answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser

_PERCEPTION = r"<\|(?:region_token_(?:start|end)|[xy]_[0-7]|(?:clip|detection|seg)_action(?:_start|_end)?)\|>"
_LOOK = re.compile(rf"(.*{_PERCEPTION})(.*)", re.DOTALL)


class LookParser(ReasoningParser):  # type: ignore[misc]
    """Tells the turns that ask for a look from the answer; in a stream by each piece of text."""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Return False: a further look may always be asked for."""
        return False

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        return False

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        return list(input_ids)

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        found = _LOOK.fullmatch(model_output)
        return (found[1], found[2] or None) if found else (None, model_output)

    def extract_reasoning_streaming(
        self, previous_text: str, current_text: str, delta_text: str, *ids: Sequence[int]
    ) -> DeltaMessage | None:
        found = _LOOK.fullmatch(delta_text)
        if found:
            return DeltaMessage(reasoning=found[1], content=found[2] or None)
        return DeltaMessage(content=delta_text)
