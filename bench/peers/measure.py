"""Ours and the peers in turn, over the same random weights, and what their logits differ by."""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import WrongResult
from bench.loops import Loops
from bench.peers import Shape
from bench.peers.ours import Ours
from bench.peers.process import Peer, PeerError
from bench.timers import Ratio, paired_ratio
from vpt_model.config import ModelConfig

LIMITS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2, "int8": 2e-1, "w8a8": 2e-1, "int4": 2e-1}
"""Root mean square difference of logits at most, in units of their standard deviation: float32 differs by the order of
sums; peers round activations to the weights' format, and to 8 bits beside theirs of 8 and 4 bits; scales of 8 bits and
some integers of 4 bits differ.
"""


@dataclass(frozen=True)
class Beside:
    """What a peer took, milliseconds, medians of all rounds; ratios above 1: ours is faster. form: of its weights."""

    form: str
    error: float
    append: float
    append_ratio: Ratio
    decode: float
    decode_ratio: Ratio
    nbytes: int


@dataclass(frozen=True)
class Row:
    """Milliseconds, medians of all rounds. read: our weights read once, by a loop. peers: or why one is absent."""

    weights: str
    append: float
    decode: float
    read: float
    nbytes: int
    peers: dict[str, Beside | str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Return the root mean square difference of two logits [vocab] in standard deviations; NaN is never close."""
    theirs = torch.from_numpy(theirs).double()
    return ((ours.double() - theirs).square().mean().sqrt() / theirs.std()).item()


def compare(
    peers: Mapping[str, Peer | str],
    state: Mapping[str, Tensor],
    config: ModelConfig,
    weights: str,
    folder: Path,
    loops: Loops,
    rounds: int,
    shape: Shape,
) -> Row:
    """Return one precision's row. peers: by name, or why one is absent; so is one that does not load these weights.

    folder: what `ours.save` wrote.

    Raises:
        WrongResult: the logits of the append, or behind the decoded tokens, differ by more than `LIMITS` from every
            peer's. One of several that is alone with its logits is not timed, and its row says so.
    """
    beside: dict[str, Beside | str] = {}
    here: dict[str, Peer] = {}
    loaded: dict[str, tuple[str, int]] = {}
    for name, peer in peers.items():
        if isinstance(peer, str):
            beside[name] = peer
            continue
        try:
            loaded[name] = peer.ask("load", str(folder), weights, shape.tokens, torch.get_num_threads())
            here[name] = peer
        except PeerError as error:
            beside[name] = str(error)
    ours = Ours(state, config, weights, shape.tokens)
    ids = torch.randint(0, config.vocab_size, (shape.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    look = ("append", ids[shape.behind : shape.behind + shape.append], shape.behind)
    answer = ("decode", ids[shape.behind + shape.append :], shape.behind + shape.append)
    errors, wrong = dict.fromkeys(here, 0.0), dict[str, str]()
    for call, chosen, behind in (("append", ids[: shape.behind], 0), look, answer):
        getattr(ours, call)(chosen, behind)
        for name, peer in list(here.items()):
            peer.ask(call, chosen, behind)
            error = difference(ours.last, _logits(peer))
            if error <= LIMITS[weights]:
                errors[name] = max(errors[name], error)
            else:
                form = loaded.pop(name)[0]
                wrong[name] = f"{form}: logits differ by {error:.1e}, {LIMITS[weights]:.0e} allowed; not timed"
                here.pop(name).ask("free")
    if wrong and not here:
        found = "; ".join(f"{weights} against {name} {why}" for name, why in wrong.items())
        raise WrongResult(f"nobody's logits are ours: {found}")
    beside |= wrong
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    order = ["ours", *here]
    for number in range(rounds):
        # Each begins as often as another.
        turn = number % len(order)
        for call, chosen, behind in (look, answer):
            for name in order[turn:] + order[:turn]:
                asked = here[name].ask(call, chosen, behind) if name in here else getattr(ours, call)(chosen, behind)
                times[name, call].append(asked)
        times["ours", "read"].append(ours.read(loops))
    for peer in here.values():
        peer.ask("free")
    middle = {key: 1e3 * statistics.median(found) for key, found in times.items()}
    for name, (form, nbytes) in loaded.items():
        append, decode = (paired_ratio(times[name, call], times["ours", call]) for call in ("append", "decode"))
        taken = middle[name, "append"], append, middle[name, "decode"], decode
        beside[name] = Beside(form, errors[name], *taken, nbytes)
    ours_took = (middle["ours", what] for what in ("append", "decode", "read"))
    return Row(weights, *ours_took, ours.nbytes, {name: beside[name] for name in peers})


def _logits(peer: Peer) -> np.ndarray:
    with tempfile.TemporaryDirectory(prefix="vpt-bench-") as folder:
        path = Path(folder) / "logits.npy"
        peer.ask("logits", str(path))
        return np.load(path)
