"""The language model against transformers' Qwen2-VL with the same random weights, and against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vpt_model.network.attention
from bench.transformers_model import transformers_model
from tests.model.inputs import appended, tiny_config, tiny_model, tiny_state
from vpt_model.checkpoint import random_state
from vpt_model.network.fused import add_rms_norm
from vpt_model.network.linear import linear
from vpt_model.network.model import Model
from vpt_model.network.positions import mrope_positions

PAD, START, END = 300, 301, 302
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plain():
    """The same random weights in transformers' model and in ours."""
    return transformers_model(tiny_config(None), tiny_state(None), PAD, START), tiny_model(None)


def picture(height, width, seed):
    """Token ids of one image, its grid in patches, and normalised patches whose two frames differ."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=generator)
    return [START, *[PAD] * (height * width // 4), END], (height, width), pixels


def words(count, seed):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def embed(model, ids, pictures):
    embeds = model.language.embed(ids)
    for _, grid, pixels in pictures:
        features = model.vision.forward(model.vision.embed_pixel_values(pixels), [grid])
        rows = (ids == PAD).nonzero()[: len(features), 0]
        embeds[rows] = features
        ids = ids.index_fill(0, rows, END)
    return embeds


def run(model, cache, ids, pictures=()):
    """Append a chunk to the cache; returns its positions and the logits of all its tokens."""
    ids = torch.tensor(ids)
    positions, _ = mrope_positions(ids, [grid for _, grid, _ in pictures], cache.next_position, PAD)
    hidden = appended(model.language, embed(model, ids, pictures), positions, [cache], [len(ids)])
    return positions, model.language.logits(hidden)


def published(reference, ids, pictures):
    ids = torch.tensor([ids])
    kinds = (ids == PAD).int()
    grids = torch.tensor([(1, *grid) for _, grid, _ in pictures]) if pictures else None
    with torch.no_grad():
        return reference(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.cat([pixels for *_, pixels in pictures]) if pictures else None,
            image_grid_thw=grids,
            mm_token_type_ids=kinds,
        ).logits[0]


def conversation(images):
    pictures = [picture(8, 12, 1), picture(6, 4, 2)][:images]
    ids = words(9, 3)
    for number, (run_of_pads, *_) in enumerate(pictures):
        ids += run_of_pads + words(5, 4 + number)
    return ids, pictures


@pytest.mark.parametrize("images", [0, 1, 2])
def test_prefill_equals_transformers(plain, images):
    reference, model = plain
    ids, pictures = conversation(images)
    _, logits = run(model, model.language.new_cache(128), ids, pictures)
    expected = published(reference, ids, pictures)
    assert expected.abs().max() > 2
    assert (logits - expected).abs().max() <= TOLERANCE


def test_continued_cache_equals_full_prefill(plain):
    reference, model = plain
    ids, pictures = conversation(2)
    split = 9 + 26 + 5
    cache = model.language.new_cache(128)
    first, head = run(model, cache, ids[:split], pictures[:1])
    second, tail = run(model, cache, ids[split:], pictures[1:])
    expected = published(reference, ids, pictures)
    assert (torch.cat([head, tail]) - expected).abs().max() <= TOLERANCE
    batch = torch.tensor([ids])
    positions, _ = reference.model.get_rope_index(
        batch, (batch == PAD).int(), torch.tensor([(1, *grid) for _, grid, _ in pictures])
    )
    assert torch.equal(torch.cat([first, second], 1), positions[:, 0])
    assert cache.next_position == positions.max() + 1
    assert cache.length == len(ids)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_any_chunking_gives_the_same_logits(plain, chunk):
    _, model = plain
    ids = words(23, 11)
    _, whole = run(model, model.language.new_cache(32), ids)
    cache = model.language.new_cache(32)
    parts = [run(model, cache, ids[begin : begin + chunk])[1] for begin in range(0, 23, chunk)]
    assert (torch.cat(parts) - whole).abs().max() <= TOLERANCE


def test_ragged_batch_equals_single_rows(plain):
    """Prefill beside decode beside append: every conversation gets what it gets alone."""
    _, model = plain
    language = model.language
    pasts, news = [words(17, 20), [], words(5, 21)], [words(1, 22), words(11, 23), words(6, 24)]
    alone, caches = [], []
    for past, new in zip(pasts, news, strict=True):
        cache, other = language.new_cache(40), language.new_cache(40)
        if past:
            run(model, cache, past)
            run(model, other, past)
        alone.append(run(model, cache, new)[1])
        caches.append(other)
    ids = torch.tensor([token for new in news for token in new])
    positions = torch.cat(
        [torch.arange(len(new)).expand(3, -1) + cache.next_position for new, cache in zip(news, caches, strict=True)], 1
    )
    hidden = appended(language, language.embed(ids), positions, caches, [len(new) for new in news])
    assert (language.logits(hidden) - torch.cat(alone)).abs().max() <= TOLERANCE
    assert [cache.length for cache in caches] == [18, 11, 11]
    assert [cache.next_position for cache in caches] == [18, 11, 11]


def test_empty_turns_are_legal(plain):
    _, model = plain
    language = model.language
    caches = [language.new_cache(8), language.new_cache(8)]
    hidden = appended(language, language.embed(torch.tensor([1, 2])), torch.arange(2).expand(3, -1), caches, [0, 2])
    assert hidden.shape == (2, 128)
    assert [cache.length for cache in caches] == [0, 2]
    assert language.logits(hidden[:0]).shape == (0, 320)


def test_hidden_states_are_behind_the_final_norm(plain):
    reference, model = plain
    ids = words(6, 30)
    hidden = model.language.forward(
        model.language.embed(torch.tensor(ids)), torch.arange(6).expand(3, -1), [model.language.new_cache(8)], [6]
    )
    with torch.no_grad():
        expected = reference.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert (hidden - expected).abs().max() <= TOLERANCE


def test_every_token_passes_once_and_the_mask_is_built_once(plain, monkeypatch):
    _, model = plain
    calls, appended = [], []
    attention = vpt_model.network.attention
    mask, append = attention.causal_mask, attention.append_visual_kv_
    monkeypatch.setattr(attention, "causal_mask", lambda *args: calls.append(args[:2]) or mask(*args))
    monkeypatch.setattr(
        attention, "append_visual_kv_", lambda q, *a, **k: appended.append(len(q)) or append(q, *a, **k)
    )
    cache = model.language.new_cache(32)
    for count in (7, 5, 1):
        run(model, cache, words(count, count))
    assert calls == [(7, 0), (5, 7), (1, 12)]
    assert appended == [count for count in (7, 5, 1) for _ in range(4)]
    assert [mask(*call, torch.float32, None) is None for call in calls] == [True, False, True]


def test_arguments_must_agree(plain):
    _, model = plain
    language = model.language
    embeds, positions = language.embed(torch.tensor([1, 2])), torch.arange(2).expand(3, -1)
    cache = language.new_cache(8)
    for arguments, message in (
        ((embeds, positions, [cache], [3]), r"need \[3, 128\]"),
        ((embeds, positions[:2], [cache], [2]), r"positions is \(2, 2\)"),
        ((embeds, positions, [cache], [1, 1]), "1 caches and 2 lengths"),
        ((embeds, positions, [cache, cache], [1, 1]), "a cache of its own|one cache of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            language.forward(*arguments)
    with pytest.raises(ValueError, match="positions span"):
        language.forward(embeds, positions + 4095, [cache], [2])
    assert cache.length == 0


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_head_groupings_equal_transformers(heads):
    config = replace(tiny_config(None), num_attention_heads=heads[0], num_key_value_heads=heads[1])
    state = random_state(config, 5)
    model, ids = Model.from_state(config, state), words(12, 40)
    cache = model.language.new_cache(16)
    logits = torch.cat([run(model, cache, part)[1] for part in (ids[:5], ids[5:11], ids[11:])])
    expected = published(transformers_model(config, state, PAD, START), ids, [])
    assert (logits - expected).abs().max() <= TOLERANCE


def test_bfloat16_is_as_close_as_transformers(plain):
    reference, _ = plain
    ids, _ = conversation(0)
    ids += words(30, 50)
    exact = published(reference, ids, [])
    state = random_state(tiny_config(None), 0, torch.bfloat16)
    ours = Model.from_state(tiny_config(None), state)
    cache = ours.language.new_cache(64)
    logits = torch.cat([run(ours, cache, part)[1] for part in (ids[:20], ids[20:38], ids[38:])])
    theirs = published(transformers_model(tiny_config(None), state, PAD, START).bfloat16(), ids, [])
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().mean() <= 2 * (theirs.float() - exact).abs().mean()


def test_bfloat16_norm_rounds_as_transformers():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    generator = torch.Generator().manual_seed(7)
    x, weight = (torch.randn(size, generator=generator).bfloat16() for size in ((40, 128), (128,)))
    norm = Qwen2VLRMSNorm(128).bfloat16()
    norm.weight.data.copy_(weight)
    assert torch.equal(add_rms_norm(x, None, weight, 1e-6)[1], norm(x))


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (97, 31), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(rows, shape, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in ((rows, shape[1]), shape, shape[:1])
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-2}
    for used in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if used is None else used.double())
        out = linear(x, weight, used)
        assert out.dtype == dtype
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), exact, **tolerance)
