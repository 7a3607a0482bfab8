"""What the engine asks of a GPU is counted here without one, `python -m bench launches`; it may import nothing else of
the benchmark.

`pretended` is the GPU that is not there, `kernels` says how many kernels an operator of torch is, `counts` runs the
engine. `budgets.json` holds what each number may be; its page is docs/launches.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.launches.pretended import Tally

BUDGETS_FILE = Path(__file__).with_name("budgets.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "launches.md"
COLUMNS = {
    "kernels": "kernels",
    "replays": "graph replays",
    "between": "launched between them",
    "waits": "host waits",
    "uploads": "copies to the device",
    "pageable": "of these pageable",
    "downloads": "copies back",
    "megabytes": "MB read",
}
Totals = dict[str, int]


def totals(tally: Tally) -> Totals:
    """Return a tally as plain totals; a read of a token is a wait and no copy."""
    return {
        "kernels": tally.kernels,
        "replays": tally.replays,
        "between": tally.between,
        "waits": tally.waits.total(),
        "uploads": tally.uploads,
        "pageable": tally.pageable,
        "downloads": tally.downloads,
        "megabytes": round(tally.read / 1e6),
    }


def budgets() -> dict[str, dict[str, Totals]]:
    """Return the totals: preset → what is counted → totals."""
    return json.loads(BUDGETS_FILE.read_text())


def page(budget: dict[str, dict[str, Totals]]) -> str:
    """Return docs/launches.md."""
    lines = [
        "# What the engine asks of a GPU",
        "",
        "<!-- Written by `python -m bench launches --write`. -->",
        "",
        "Counted without a GPU by `python -m bench launches`: the engine runs, with graphs, in bfloat16 and at true",
        "shapes, on tensors that have no values. A kernel of ours counts where it is launched, an operator of torch",
        "by [a table](../bench/launches/kernels.py), a graph's replay as its kernels. A wait is a call at which the",
        "host may stand still until the device has caught up: a synchronised stream or event, or a value that is",
        "read. Every kernel reads its inputs in full, of the caches what they hold. A look goes from the token that",
        "ends the round before it, an action start or the end of the turn that names a region, to the first answer",
        "token; `make gpu` times the same span. Counted from the token that closes its last box, a region's look",
        "would be one decode step, and its replay, more. Between replays there may be kernels and copies that are in",
        "no graph. While the host waits for a decoded token, the device runs the step that feeds it; a sampled token",
        "is drawn in the graph of the step before it.",
        "[A test](../tests/bench/test_launches.py) holds every number.",
        "",
    ]
    for preset, rows in budget.items():
        lines += [
            f"## {preset.upper()}",
            "",
            "| | " + " | ".join(COLUMNS.values()) + " |",
            "|---" * (1 + len(COLUMNS)) + "|",
        ]
        lines += [f"| {name} | " + " | ".join(f"{row[key]:,}" for key in COLUMNS) + " |" for name, row in rows.items()]
        lines.append("")
    return "\n".join(lines)


def write(found: dict[str, dict[str, Totals]]) -> None:
    """Make `found` the budgets and the page."""
    BUDGETS_FILE.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
