"""The comparison with other engines, replaced here by one of ours: what is handed over, gated and timed."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.cases import WrongResult
from bench.environment import ROOT
from bench.loops import Loops
from bench.peers import Shape, __main__, measure
from bench.peers.__main__ import COLUMNS, lines, start
from bench.peers.measure import LIMITS, compare
from bench.peers.ours import Ours, named, save
from bench.peers.process import Peer, PeerError
from vpt_model.checkpoint import random_state
from vpt_model.config import PRESETS

CONFIG = PRESETS["tiny"]
SHAPE = Shape(behind=9, append=7, decode=3)
SCRIPT = """
import json, os, sys
print("a library says something", flush=True)
for line in sys.stdin:
    method, *arguments = json.loads(line)
    if method == "die":
        print("out of memory", file=sys.stderr)
        os._exit(1)
    failed = {"error": "ValueError: no such file"}
    print(json.dumps(failed if method == "fail" else {"result": [method, *arguments]}), flush=True)
"""


class Twin:
    """A peer in this process over the same weights; `off` is added to its logits, in standard deviations."""

    def __init__(self, state, off: float = 0.0) -> None:
        self.state, self.off, self.asked = state, off, []

    def ask(self, method, *arguments):
        self.asked.append(method)
        return getattr(self, method)(*arguments)

    def load(self, folder, weights, tokens, threads):
        # int4 is far from float32 on so small a model: a twin has the same integers.
        self.model = Ours(self.state, CONFIG, "int4" if weights == "int4" else "float32", tokens)
        self.append, self.decode = self.model.append, self.model.decode
        return f"twin of {weights}", 1000

    def logits(self, path):
        logits = self.model.last
        np.save(path, (logits + self.off * logits.std()).numpy())

    def free(self):
        self.model = None


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def loops():
    return Loops.compiled()


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_language_model_is_handed_over_once(tmp_path, tied):
    config = replace(CONFIG, tie_word_embeddings=tied)
    state = random_state(config)
    mine = {name for name in state if name.startswith(("model.", "lm_head"))} - ({"lm_head.weight"} if tied else set())
    others = {name for name in mine if not name.startswith(("model.layers.", "model.embed", "model.norm", "lm_head"))}
    found = list(named(state, config))
    assert len(found) == len({name for name, _ in found}) == len(mine - others)
    save(state, config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == config.hidden_size
    for name, tensor in found:
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), tensor.numpy())


@pytest.mark.parametrize("weights", LIMITS)
def test_all_are_timed_in_turn_once_their_logits_agree(state, loops, tmp_path, weights):
    twins = {"first": Twin(state), "second": Twin(state)}
    row = compare({**twins, "third": "not installed"}, state, CONFIG, weights, tmp_path, loops, 6, SHAPE)
    for name, twin in twins.items():
        found = row.peers[name]
        assert found.form == f"twin of {weights}" and found.error <= LIMITS[weights] and found.nbytes == 1000
        assert twin.asked.count("decode") == 1 + 6 and twin.asked.count("append") == 2 + 6 and twin.asked[-1] == "free"
        assert found.append_ratio.low <= found.append_ratio.ratio <= found.append_ratio.high
    shown = lines(row)
    assert list(row.peers) == [*twins, "third"] and [len(line) for line in shown] == [len(COLUMNS)] * 3
    assert shown[2][1] == "third: absent, not installed" and row.read > 0
    assert json.dumps(row.as_dict())


def test_a_peer_that_does_not_load_the_weights_is_absent_in_this_row(state, loops, tmp_path):
    class Narrow(Twin):
        def load(self, folder, weights, tokens, threads):
            raise PeerError("load: knows no int8")

    row = compare({"narrow": Narrow(state), "twin": Twin(state)}, state, CONFIG, "int8", tmp_path, loops, 6, SHAPE)
    assert row.peers["narrow"] == "load: knows no int8" and row.peers["twin"].decode > 0


def test_a_peer_that_is_not_installed_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(__main__, "PEERS", {"nobody": "bench.peers.nobody"})
    with ExitStack() as stack:
        peers, versions = start(Path(sys.executable), stack)
    assert "No module named" in peers["nobody"] and not versions


def test_our_bytes_are_those_of_every_matrix(state):
    assert not CONFIG.tie_word_embeddings
    matrices = [tensor for name, tensor in named(state, CONFIG) if tensor.ndim > 1 and name != "token_embd.weight"]
    ours = Ours(state, CONFIG, "bfloat16", SHAPE.tokens)
    # Panels are padded to whole tiles.
    assert sum(tensor.nbytes for tensor in matrices) <= ours.nbytes <= 1.5 * sum(tensor.nbytes for tensor in matrices)


def test_a_call_forgets_what_the_one_before_appended(state):
    ours, anew = (Ours(state, CONFIG, "float32", SHAPE.tokens) for _ in range(2))
    ours.append([1, 2, 3], 0)
    ours.append([4, 5], 3)
    ours.decode([6, 7, 8], 3)
    ours.append([4, 5], 3)
    anew.append([1, 2, 3], 0)
    anew.append([4, 5], 3)
    assert torch.equal(ours.last, anew.last)


@pytest.mark.parametrize("off", [1.1, float("nan")])
@pytest.mark.parametrize("weights", LIMITS)
def test_wrong_logits_are_not_timed(state, loops, tmp_path, weights, off, monkeypatch):
    peer = Twin(state, off * LIMITS[weights] + (LIMITS[weights] if weights in ("int8", "w8a8") else 0))
    monkeypatch.setattr(measure, "paired_ratio", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongResult, match=f"{weights} against wrong twin of {weights}"):
        compare({"wrong": peer}, state, CONFIG, weights, tmp_path, loops, 6, SHAPE)
    assert peer.asked.count("decode") <= 1


@pytest.mark.parametrize("off", [1.1, float("nan")])
def test_a_peer_alone_with_its_logits_is_named(state, loops, tmp_path, off):
    peers = {"wrong": Twin(state, off * LIMITS["float16"]), "right": Twin(state, 0.0)}
    row = compare(peers, state, CONFIG, "float16", tmp_path, loops, 6, SHAPE)
    said = row.peers["wrong"]
    assert isinstance(said, str) and "logits differ by" in said and "not timed" in said
    assert not isinstance(row.peers["right"], str)
    assert peers["wrong"].asked.count("decode") <= 1 and peers["wrong"].asked[-1] == "free"


def test_a_peer_answers_fails_and_dies_in_words(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(SCRIPT)
    with Peer(Path(sys.executable), str(script)) as peer:
        assert peer.ask("append", [1, 2], 3) == ["append", [1, 2], 3]
        with pytest.raises(PeerError, match="fail: ValueError: no such file"):
            peer.ask("fail")
        assert peer.ask("free") == ["free"]
        for _ in range(2):
            with pytest.raises(PeerError, match="the process has ended; out of memory"):
                peer.ask("die")


INTEL, AMD = "intel-r-xeon-r-processor-avx512", "amd-epyc-avx512"


@pytest.mark.parametrize(
    "machine, recorded",
    [
        (f"{AMD}-2-threads", list(LIMITS)),
        (f"{INTEL}-2-threads", ["float32", "bfloat16", "float16", "int8"]),
        (f"{INTEL}-1-threads", ["float32", "int8"]),
    ],
)
def test_the_page_says_what_was_recorded(machine, recorded):
    page = (ROOT / "docs" / "weights.md").read_text()
    rows = json.loads((ROOT / "bench" / "results" / machine / "peers.json").read_text())["rows"]
    assert [row["weights"] for row in rows] == recorded
    for row in rows:
        for name, peer in row["peers"].items():
            if isinstance(peer, str):
                assert name == "OpenVINO" and row["weights"] in ("float16", "int4")
                continue
            told = f"| {row['weights']} / {name} {peer['form']} "
            for what, digits in (("append", 0), ("decode", 1)):
                ratio = peer[f"{what}_ratio"]
                told += f"| {row[what]:,.{digits}f}, {peer[what]:,.{digits}f} "
                told += f"| {ratio['ratio']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f}) "
            assert told in page
