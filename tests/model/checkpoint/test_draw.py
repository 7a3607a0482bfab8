"""Random weights: the same whenever and however they are drawn, and no more of them in memory than are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.model.checkpoints import EMBEDDING, HEAD
from tests.model.inputs import tiny_config, tiny_model
from vpt_model.checkpoint import draw, random_state, random_weights
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import PRESETS
from vpt_model.network.model import Model
from vpt_model.network.state import PRECISIONS, rounded

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("clip", "detection", "seg", None)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_random_state_is_a_function_of_its_seed():
    first, again, other = (random_state(tiny_config(), seed) for seed in (0, 0, 1))
    assert equal(first, again)
    assert not torch.equal(first[EMBEDDING], other[EMBEDDING])
    assert equal(random_state(tiny_config(), 0, torch.bfloat16), {k: v.bfloat16() for k, v in first.items()})
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == expected_shapes(tiny_config())


def test_random_state_makes_a_lively_model():
    model, ids = tiny_model(), torch.arange(200)
    hidden = model.language.forward(
        model.language.embed(ids), ids.expand(3, -1), [model.language.new_cache(200)], [200]
    )
    logits = model.language.logits(hidden)
    margin = logits.topk(2).values.diff().abs()
    assert 0.8 < logits.std() < 1.3
    assert margin.median() > 0.1
    assert len(logits.argmax(-1).unique()) > 40


def test_random_weights_are_drawn_where_they_stay() -> None:
    config, told = replace(PRESETS["tiny"], kind=None), []
    state = random_state(config, 1, torch.bfloat16, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in state.values())
    gate, up = (state[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert gate.data_ptr() + gate.nbytes == up.data_ptr()
    wide = random_state(config, 1)
    assert all(torch.equal(tensor, wide[name].bfloat16()) for name, tensor in state.items())


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_weights_do_not_depend_on_when_they_are_taken(kind, tied) -> None:
    config = replace(tiny_config(kind), tie_word_embeddings=tied)
    expected = random_state(config, 2, torch.bfloat16)
    for order in (list, reversed, sorted):
        weights = random_weights(config, 2, torch.bfloat16)
        found = {name: weights[name].take() for name in order(expected) if name != HEAD or not tied}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert {name: tuple(one.shape) for name, one in weights.items()} == expected_shapes(config)
    assert (weights[HEAD] is weights[EMBEDDING]) == tied
    with pytest.raises(ValueError, match=rf"{EMBEDDING} was taken before: keep it, or call random_weights again"):
        weights[EMBEDDING].take()


@pytest.mark.parametrize("weights", (*PRECISIONS, None))
@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_draws_as_it_goes(kind, tied, weights, monkeypatch) -> None:
    """Of what comes before a tensor that is taken, no more than a few biases are drawn and not taken yet."""
    config = replace(tiny_config(kind), tie_word_embeddings=tied, num_hidden_layers=4)
    ahead, take = [0], draw._Source.take

    def watched(source, name):
        tensor = take(source, name)
        ahead.append(sum(one.nbytes for one in source._passed.values()))
        return tensor

    monkeypatch.setattr(draw._Source, "take", watched)
    dtype = torch.bfloat16 if weights in ("auto", "bfloat16", "int8") else torch.float32
    given, told = random_weights(config, 1, dtype), []
    total = sum(one.nbytes for one in given.values())
    drawn = Model.from_state(config, given, weights, consume=True, progress=told.append)
    assert max(ahead) <= 2 * 2**10
    assert told == sorted(told) and 0.8 * total <= told[-1] <= total
    plain = Model.from_state(config, random_state(config, 1, dtype), weights)
    ids = torch.arange(5)
    for one, other in (
        (drawn.language.embed(ids), plain.language.embed(ids)),
        (drawn.language.norm, plain.language.norm),
    ):
        assert torch.equal(one, other)
    if kind in ("detection", "seg"):
        image = torch.zeros(64, 64, 3, dtype=torch.uint8)
        seen = [model.encoder(model.encoder.embed_regions([image], [(0, 0, 0, 64, 64)])) for model in (drawn, plain)]
        assert torch.equal(*seen)


def test_rounding_draws_one_after_the_other() -> None:
    config = replace(tiny_config("clip"), tie_word_embeddings=True)
    for weights in PRECISIONS:
        found = rounded(random_weights(config, 1), weights)
        assert equal(found, rounded(random_state(config, 1), weights))
        assert found[HEAD] is found[EMBEDDING]


_MEASURE = """
import json, sys
from dataclasses import replace
import torch
from vpt_kernels import pack_weight
from vpt_model import Model
from vpt_model.app.terminal import resident_memory
from vpt_model.checkpoint import random_weights
from vpt_model.config import PRESETS

config = PRESETS["tiny"]
config = replace(config, hidden_size=1024, num_attention_heads=8, mrope_section=(16, 24, 24), intermediate_size=4096,
                 num_hidden_layers=8, vocab_size=16384, tie_word_embeddings=sys.argv[1] == "tied",
                 vision=replace(config.vision, hidden_size=1024))
pack_weight(torch.ones(2048, 1024), "int8")
before = resident_memory()["now"]
model = Model.from_state(config, random_weights(config, 0, torch.bfloat16), "int8", consume=True)
after = resident_memory()
print(json.dumps({"stays": after["now"] - before, "peak": after["at most"] - before}))
"""


@pytest.mark.parametrize("tied", ("tied", "untied"))
def test_peak_memory_of_a_model_in_fewer_bits(tied) -> None:
    """287 MB of bfloat16 are never there: what stays in int8, the largest weight as it is packed (34 MB), the numbers
    that are float32 (8 MB), and what has been freed since memory was last given back (32 MB).
    """
    run = [sys.executable, "-c", _MEASURE, tied]
    measured = json.loads(subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert measured["stays"] > 130e6
    assert measured["peak"] <= 1.1 * measured["stays"] + 74e6, measured
