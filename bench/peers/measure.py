"""Ours and llama.cpp in turn, over the same random weights, and what their logits differ by."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import WrongResult
from bench.loops import Loops
from bench.peers import FORMATS, Shape
from bench.peers.ours import Ours
from bench.peers.process import Peer
from bench.timers import Ratio, paired_ratio
from vpt_model.config import ModelConfig

LIMITS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2, "int8": 2e-1}
"""Root mean square difference of logits at most, in units of their standard deviation: float32 differs by the order of
sums; llama.cpp rounds activations to the weights' format, and to 8 bits beside Q8_0, whose scales are others than ours.
"""


@dataclass(frozen=True)
class Row:
    """Milliseconds, medians of all rounds; ratios above 1: ours is faster. read: our weights read once, by a loop."""

    weights: str
    form: str
    error: float
    append: float
    append_peer: float
    append_ratio: Ratio
    decode: float
    decode_peer: float
    decode_ratio: Ratio
    read: float
    nbytes: int
    nbytes_peer: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Return the root mean square difference of two logits [vocab] in standard deviations; NaN is never close."""
    theirs = torch.from_numpy(theirs).double()
    return ((ours.double() - theirs).square().mean().sqrt() / theirs.std()).item()


def compare(
    peer: Peer,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    weights: str,
    folder: Path,
    loops: Loops,
    rounds: int,
    shape: Shape,
) -> Row:
    """Return one precision's row. folder: what `ours.save` wrote; a file of this format is written beside it.

    Raises:
        WrongResult: the logits of the append, or behind the decoded tokens, differ by more than `LIMITS`.
    """
    form = FORMATS[weights]
    file, threads = folder / f"{form}.gguf", torch.get_num_threads()
    nbytes_peer = peer.ask("write", str(folder), str(file), form)
    cache = {"float32": "F32", "bfloat16": "BF16"}.get(weights, "F16")
    peer.ask("load", str(file), shape.tokens, threads, cache)
    ours = Ours(state, config, weights, shape.tokens)
    ids = torch.randint(0, config.vocab_size, (shape.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    look = ("append", ids[shape.behind : shape.behind + shape.append], shape.behind)
    answer = ("decode", ids[shape.behind + shape.append :], shape.behind + shape.append)
    errors = []
    for call, chosen, behind in (("append", ids[: shape.behind], 0), look, answer):
        getattr(ours, call)(chosen, behind)
        peer.ask(call, chosen, behind)
        errors.append(difference(ours.last, _logits(peer)))
    if not max(errors) <= LIMITS[weights]:
        raise WrongResult(f"{weights} against {form}: logits differ by {max(errors):.1e}; a wrong row is not timed")
    times: dict[str, list[float]] = {name: [] for name in ("append", "append peer", "decode", "decode peer", "read")}
    for number in range(rounds):
        # Each begins half of the rounds.
        order = (ours, peer) if number % 2 else (peer, ours)
        for call, chosen, behind in (look, answer):
            for one in order:
                if one is ours:
                    times[call].append(getattr(ours, call)(chosen, behind))
                else:
                    times[f"{call} peer"].append(peer.ask(call, chosen, behind))
        times["read"].append(ours.read(loops))
    peer.ask("free")
    middle = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    return Row(
        weights,
        form,
        max(errors),
        middle["append"],
        middle["append peer"],
        paired_ratio(times["append peer"], times["append"]),
        middle["decode"],
        middle["decode peer"],
        paired_ratio(times["decode peer"], times["decode"]),
        middle["read"],
        ours.nbytes,
        nbytes_peer,
    )


def _logits(peer: Peer) -> np.ndarray:
    with tempfile.TemporaryDirectory(prefix="vpt-bench-") as folder:
        path = Path(folder) / "logits.npy"
        peer.ask("logits", str(path))
        return np.load(path)
