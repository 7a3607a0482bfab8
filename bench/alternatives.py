"""Every alternative of every case, by the name under which results hold it."""

from __future__ import annotations

from bench.cases import Alternative, append, chat, control, decode, engine, linear, live, patch, roi

CASES = (append, chat, control, decode, engine, linear, live, patch, roi)
ALTERNATIVES: dict[str, Alternative] = {one.name: one for case in CASES for one in case.ALTERNATIVES}
