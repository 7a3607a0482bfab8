"""What a request may ask: `SamplingParams.extra_args`, which clients of the HTTP API set as `vllm_xargs`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vpt_model.config import ENCODERS, require_integer, shown

LOOKS, MAX_LOOKS = "vpt_looks", "vpt_max_looks"
"""Looks to take unasked, one per round (a string or a list of strings); second looks that a request may take."""
SLOT = "vpt_control_slot"
"""The scheduler's mark on a step: where the state behind its last token goes. No client may set it."""

MOST_LOOKS, MOST_BOXES = 8, 64
"""Looks of a request, and boxes of a look: cutting them out holds up all requests of the engine core."""
_REGION = re.compile(r"region:x[0-7],y[0-7],x[0-7],y[0-7](\+x[0-7],y[0-7],x[0-7],y[0-7])*")


class Options(NamedTuple):
    """What a request asks: at most `max_looks` second looks; `looks` taken unasked, in `Engine.stream`'s syntax."""

    max_looks: int = 1
    looks: tuple[str, ...] = ()


def read_options(extra: Mapping[str, Any] | None, encoder: str) -> Options:
    """Return the options among a request's extra arguments.

    encoder: what the checkpoint re-encodes with, say "clip"; "" if it cannot look. Raises ValueError or TypeError for
    anything that is not of the stated form, and for other arguments of this package's prefix, say a misspelt one.
    """
    extra = extra or {}
    if unknown := [name for name in extra if name.startswith("vpt_") and name not in (LOOKS, MAX_LOOKS)]:
        raise ValueError(f"{unknown[0]} is no option: leave it out, or give {LOOKS} or {MAX_LOOKS}")
    most = require_integer(MAX_LOOKS, extra.get(MAX_LOOKS, 1), 0, MOST_LOOKS)
    looks = extra.get(LOOKS, ())
    looks = (looks,) if isinstance(looks, str) else looks
    if not isinstance(looks, (list, tuple)) or not all(isinstance(look, str) for look in looks):
        raise TypeError(f"{LOOKS} is {shown(looks)}; it must be a string or a list of strings")
    if looks and not encoder:
        raise ValueError(f"{LOOKS} has {looks[0]!r}, but this checkpoint has no tokens of looks: leave {LOOKS} out")
    for look in looks:
        if look != encoder and not _REGION.fullmatch(look):
            others = [name for name in ENCODERS if name != encoder]
            reason = f"this checkpoint re-encodes with {encoder!r}" if look in others else "that is no look"
            raise ValueError(f'{LOOKS} has {look!r}, but {reason}: give "region:x2,y1,x5,y4" or {encoder!r}')
        if (boxes := look.count("+") + 1) > MOST_BOXES:
            raise ValueError(f"{LOOKS} has a look of {boxes} boxes: give at most {MOST_BOXES}")
    if len(looks) > most:
        raise ValueError(f"{LOOKS} names {len(looks)} looks, but {MAX_LOOKS} is {most}: raise it, at most {MOST_LOOKS}")
    return Options(most, tuple(looks))
