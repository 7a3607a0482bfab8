"""M-RoPE and 2-D positions: the published numbers, transformers' own function, and continuation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.transformers_model import transformers_model
from tests.model.inputs import golden, tiny_config, tiny_state
from vpt_model.network.positions import mrope_positions, vision_positions

PAD, START, END, TEXT = 300, 301, 302, 7
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda grid: (2 * grid[0], 2 * grid[1]))
# A conversation: text lengths around images; every image brings its two vision marks.
CONVERSATIONS = st.lists(st.tuples(st.integers(0, 5), GRIDS), max_size=4)


def tokens(conversation, tail=0):
    ids = []
    for text, (height, width) in conversation:
        ids += [TEXT] * text + [START] + [PAD] * (height * width // 4) + [END]
    return torch.tensor(ids + [TEXT] * tail, dtype=torch.int64)


def test_published_numbers():
    # 512x384 pixels: grid (28, 36), 252 tokens from index 15; the mark behind the image gets 33, a shift of -234.
    ids = torch.tensor([TEXT] * 15 + [PAD] * 252 + [END, TEXT])
    positions, after = mrope_positions(ids, [(28, 36)], 0, PAD)
    assert positions[:, 15].tolist() == [15, 15, 15]
    assert positions[:, 15 + 18 * 3 + 5].tolist() == [15, 18, 20]
    assert positions[:, 266].tolist() == [15, 28, 32]
    assert positions[:, 267].tolist() == [33, 33, 33]
    assert after - ids.numel() == -234


@pytest.mark.parametrize(("name", "cases"), [("clip", ["fwd", "gen_b2"]), ("region", ["fwd", "gen_b2"])])
def test_golden_positions(name, cases):
    tensors, meta = golden(name)
    for case in cases:
        grids = iter(tensors[f"{case}.image_grid_thw"][:, 1:].tolist())
        for row, ids in enumerate(tensors[f"{case}.input_ids"]):
            keep = tensors[f"{case}.attention_mask"][row].bool()
            ids = ids[keep]
            pad, start = (meta["config"]["token_ids"][key] for key in ("image_pad", "vision_start"))
            images = sum(a == start and b == pad for a, b in zip(ids.tolist(), ids.tolist()[1:]))
            own = [tuple(next(grids)) for _ in range(images)]
            positions, after = mrope_positions(ids, own, 0, pad)
            assert torch.equal(positions, tensors[f"{case}.position_ids"][:, row, keep])
            assert after == keep.numel() + tensors[f"{case}.rope_deltas"][row]


@pytest.fixture(scope="module")
def rope_index():
    model = transformers_model(tiny_config(None), tiny_state(None), PAD, START).model

    def positions(ids, grids):
        thw = torch.tensor([(1, height, width) for height, width in grids]) if grids else None
        return model.get_rope_index(ids[None], (ids == PAD).int()[None], thw)[0][:, 0]

    return positions


@settings(max_examples=60, deadline=None)
@given(conversation=CONVERSATIONS, tail=st.integers(1, 5))
def test_equals_transformers(rope_index, conversation, tail):
    ids, grids = tokens(conversation, tail), [grid for _, grid in conversation]
    positions, after = mrope_positions(ids, grids, 0, PAD)
    assert torch.equal(positions, rope_index(ids, grids))
    assert after == positions.max() + 1


@settings(max_examples=60, deadline=None)
@given(first=CONVERSATIONS, second=CONVERSATIONS, tail=st.integers(0, 3))
def test_continuing_equals_recomputing(first, second, tail):
    head, rest = tokens(first), tokens(second, tail)
    grids = [[grid for _, grid in part] for part in (first, second)]
    whole, after = mrope_positions(torch.cat([head, rest]), grids[0] + grids[1], 0, PAD)
    left, middle = mrope_positions(head, grids[0], 0, PAD)
    right, end = mrope_positions(rest, grids[1], middle, PAD)
    assert torch.equal(torch.cat([left, right], 1), whole)
    assert end == after


def test_pads_of_reencoded_images_are_text():
    other_pad = 303
    ids = torch.tensor([TEXT, START, *[other_pad] * 20, END])
    positions, after = mrope_positions(ids, [], 41, PAD)
    assert torch.equal(positions, torch.arange(41, 41 + 23).expand(3, -1))
    assert after == 64


def test_empty_chunk():
    positions, after = mrope_positions(torch.empty(0, dtype=torch.int64), [], 9, PAD)
    assert positions.shape == (3, 0)
    assert after == 9


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([PAD] * 4, [(2, 4)] * 3, "make 6"),
        ([PAD] * 4, [], "4 image tokens"),
        ([PAD] * 3, [(2, 8)], "3 image tokens"),
        ([PAD, TEXT, PAD], [(2, 4)], "interrupted"),
        ([PAD] * 2 + [END] + [PAD] * 6, [(4, 6), (2, 4)], "interrupted"),
        ([PAD] * 3, [(3, 4)], "multiple of merge_size"),
        ([], [(0, 4)], "multiple of merge_size"),
    ],
)
def test_disagreement_is_an_error(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(torch.tensor(ids, dtype=torch.int64), grids, 0, PAD)


@settings(max_examples=30, deadline=None)
@given(grids=st.lists(GRIDS, max_size=4))
def test_vision_positions_equal_transformers(grids):
    from transformers.vision_utils import get_vision_position_ids

    thw = torch.tensor([(1, height, width) for height, width in grids]).view(-1, 3)
    expected = get_vision_position_ids(thw, 2) if grids else torch.empty(0, 2, dtype=torch.int64)
    assert torch.equal(vision_positions(grids), expected)
