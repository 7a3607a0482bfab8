"""The language model beside other engines: `make bench-peers`, which also makes the environment that they run in."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.environment import ROOT, environment, machine
from bench.loops import Loops
from bench.peers import PEERS, Shape
from bench.peers.measure import LIMITS, Row, compare
from bench.peers.ours import save
from bench.peers.process import Peer, PeerError
from vpt_model.checkpoint import random_state
from vpt_model.config import PRESETS

COLUMNS = ("weights", "peer", "append, ms", "peer's", "ratio", "token, ms", "peer's", "ratio", "GB/s", "of a mere read")


def lines(row: Row) -> list[tuple[str, ...]]:
    """Return a row as it is shown, a line a peer; ratios with their 95 % intervals, above 1: ours is faster."""
    shown = []
    for name, peer in row.peers.items():
        if isinstance(peer, str):
            shown.append((row.weights, f"{name}: absent, {peer}", *[""] * (len(COLUMNS) - 2)))
            continue
        ratios = (f"{one.ratio:.2f} ({one.low:.2f} … {one.high:.2f})" for one in (peer.append_ratio, peer.decode_ratio))
        appended, decoded = ratios
        shown.append(
            (
                row.weights,
                f"{name} {peer.form}",
                f"{row.append:.0f}",
                f"{peer.append:.0f}",
                appended,
                f"{row.decode:.1f}",
                f"{peer.decode:.1f}",
                decoded,
                f"{row.nbytes / row.decode / 1e6:.1f} / {peer.nbytes / peer.decode / 1e6:.1f}",
                f"{row.read / row.decode:.0%}",
            )
        )
    return shown


def start(python: Path, stack: ExitStack) -> tuple[dict[str, Peer | str], dict[str, str]]:
    """Return every peer, or the reason why it does not run here, and the versions of those that do."""
    peers: dict[str, Peer | str] = {}
    versions: dict[str, str] = {}
    for name, module in PEERS.items():
        try:
            peers[name] = peer = stack.enter_context(Peer(python, "-m", module))
            versions |= peer.ask("versions")
        except PeerError as error:
            peers[name] = str(error)
    return peers, versions


def main(
    python: Annotated[Path, typer.Option(help="Of the environment that has the peers.")] = ROOT
    / ".venv/peers/bin/python",
    layers: Annotated[int, typer.Option(min=1, help="Of the 2B's widths; the head is whole.")] = 6,
    rounds: Annotated[int, typer.Option(min=6, help="In which all are timed.")] = 12,
    weights: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LIMITS)}; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default bench/results/<machine>/peers.json.")] = None,
) -> None:
    """Time the append of a look's tokens and the tokens behind it, in turn with the peers that are installed."""
    if unknown := set(weights or ()) - set(LIMITS):
        raise typer.BadParameter(f"--weights {', '.join(sorted(unknown))}: choose from {', '.join(LIMITS)}")
    if not python.exists():
        raise typer.BadParameter(f"there is no {python}; `make bench-peers` installs the peers")
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
    with ExitStack() as stack, torch.inference_mode():
        peers, versions = start(python, stack)
        if not versions:
            raise SystemExit(f"no peer runs: {peers}")
        save(state, config, folder)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            for name in weights or LIMITS:
                rows.append(compare(peers, state, config, name, folder, loops, rounds, shape))
                for line in lines(rows[-1]):
                    console.print(*line, sep=" | ")
        except PeerError as error:
            raise SystemExit(f"a peer failed while it was timed: {error}") from None
    title = f"{layers} layers of the 2B's widths and its head; {shape.append} tokens behind {shape.behind}, {machine()}"
    table = Table(*COLUMNS, title=title)
    for line in (line for row in rows for line in lines(row)):
        table.add_row(*line)
    console.print(table)
    path = out or ROOT / "bench" / "results" / machine() / "peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment() | versions, "layers": layers, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"saved: {path}")


if __name__ == "__main__":
    typer.run(main)
