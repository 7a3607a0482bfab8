"""The language model beside llama.cpp: `make bench-peers`, which also makes the environment that llama.cpp runs in."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.environment import ROOT, environment, machine
from bench.loops import Loops
from bench.peers import FORMATS, Shape
from bench.peers.measure import Row, compare
from bench.peers.ours import save
from bench.peers.process import Peer, PeerError
from vpt_model.checkpoint import random_state
from vpt_model.config import PRESETS

COLUMNS = ("weights", "append, ms", "llama.cpp", "ratio", "token, ms", "llama.cpp", "ratio", "GB/s", "of a mere read")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as it is shown; ratios with their 95 % intervals, above 1: ours is faster."""
    ratios = (f"{one.ratio:.2f} ({one.low:.2f} … {one.high:.2f})" for one in (row.append_ratio, row.decode_ratio))
    appended, decoded = ratios
    return (
        f"{row.weights} / {row.form}",
        f"{row.append:.0f}",
        f"{row.append_peer:.0f}",
        appended,
        f"{row.decode:.1f}",
        f"{row.decode_peer:.1f}",
        decoded,
        f"{row.nbytes / row.decode / 1e6:.1f} / {row.nbytes_peer / row.decode_peer / 1e6:.1f}",
        f"{row.read / row.decode:.0%}",
    )


def main(
    python: Annotated[Path, typer.Option(help="Of the environment that has llama-cpp-python and gguf.")] = ROOT
    / ".venv/peers/bin/python",
    layers: Annotated[int, typer.Option(min=1, help="Of the 2B's widths; the head is whole.")] = 6,
    rounds: Annotated[int, typer.Option(min=6, help="In which both are timed.")] = 12,
    weights: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(FORMATS)}; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default bench/results/<machine>/peers.json.")] = None,
) -> None:
    """Time the append of a look's tokens and the tokens behind it, in turn with llama.cpp."""
    if unknown := set(weights or ()) - set(FORMATS):
        raise typer.BadParameter(f"--weights {', '.join(sorted(unknown))}: choose from {', '.join(FORMATS)}")
    if not python.exists():
        raise typer.BadParameter(f"llama.cpp is absent: there is no {python}; `make bench-peers` installs it")
    config = replace(PRESETS["2b-slice"], num_hidden_layers=layers)
    # What bfloat16 holds exactly, all formats but the 8 bits hold as well.
    state = random_state(config, dtype=torch.bfloat16)
    folder, console, shape, loops = (
        ROOT / "build" / "peers",
        Console(width=None if sys.stdout.isatty() else 200),
        Shape(),
        Loops.compiled(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    rows = []
    with Peer(python, Path(__file__).with_name("llama.py")) as peer, torch.inference_mode():
        save(state, config, folder)
        try:
            versions = peer.ask("versions")
            for name in weights or FORMATS:
                rows.append(compare(peer, state, config, name, folder, loops, rounds, shape))
                console.print(*cells(rows[-1]), sep=" | ")
        except PeerError as error:
            raise SystemExit(f"llama.cpp does not run: {error}") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    title = f"{layers} layers of the 2B's widths and its head; {shape.append} tokens behind {shape.behind}, {machine()}"
    table = Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    path = out or ROOT / "bench" / "results" / machine() / "peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment() | versions, "layers": layers, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"saved: {path}")


if __name__ == "__main__":
    typer.run(main)
