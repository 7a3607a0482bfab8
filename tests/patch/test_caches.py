"""The caches of vLLM, FlashInfer and transformers hold what `append_visual_kv` would have stored."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

from tests.helpers import assert_same_bits, each_backend, normal, numbers
from vpt_kernels import (
    append_to_flashinfer_pages_,
    append_to_layer_,
    append_to_vllm_pages_,
    append_visual_kv,
    flashinfer_slots,
    rotary_table,
)

HEADS, KV_HEADS, DIM, SECTIONS = 4, 2, 16, (2, 3, 3)
TABLE = rotary_table(64, DIM)


def tokens(count: int, key: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (
        normal(count, heads, DIM, key=(key, name)) for heads, name in ((HEADS, "q"), (KV_HEADS, "k"), (KV_HEADS, "v"))
    )
    return q, k, v, torch.from_numpy(numbers("positions", key).integers(0, 64, (3, count)))


def rotated(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q and k as the operator rotates them."""
    cache = torch.zeros(2, *k.shape)
    out = append_visual_kv(q, k, v, TABLE, positions, torch.arange(len(k)), *cache, SECTIONS)
    return out, cache[0]


@pytest.mark.parametrize("pair", (False, True), ids=("one tensor", "pair"))
def test_vllm(pair: bool) -> None:
    q, k, v, positions = tokens(5, "vllm")
    expected_q, expected_k = rotated(q, k, v, positions)
    pages = torch.full((2, 3, 4, KV_HEADS, DIM), 7.0)
    slots = torch.tensor([9, -1, 0, 11, 4])
    append_to_vllm_pages_(q, k, v, TABLE, positions, tuple(pages) if pair else pages, slots, SECTIONS)
    assert_same_bits(q, expected_q)
    expected = torch.full((2, 12, KV_HEADS, DIM), 7.0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[:, slot] = torch.stack([expected_k[token], v[token]])
    assert_same_bits(pages.flatten(1, 2), expected)
    with pytest.raises(ValueError, match="kv_cache holds 3 tensors"):
        append_to_vllm_pages_(q, k, v, TABLE, positions, torch.zeros(3, 3, 4, KV_HEADS, DIM), slots, SECTIONS)


def test_vllm_pads_what_it_captured() -> None:
    """Fewer slots than rows: the rest is padding, whose q and positions nobody reads."""
    q, k, v, positions = tokens(5, "captured")
    expected_q, expected_k = rotated(q, k, v, positions)
    pages, padding = torch.full((2, 3, 4, KV_HEADS, DIM), 7.0), q[3:].clone()
    positions[:, 3:] = 1 << 40
    append_to_vllm_pages_(q, k, v, TABLE, positions, pages, torch.tensor([9, -1, 4]), SECTIONS)
    assert_same_bits(q, torch.cat([expected_q[:3], padding]))
    expected = torch.full((2, 12, KV_HEADS, DIM), 7.0)
    expected[:, 9], expected[:, 4] = (torch.stack([expected_k[token], v[token]]) for token in (0, 2))
    assert_same_bits(pages.flatten(1, 2), expected)
    with pytest.raises(ValueError, match=r"slots \(6,\) must be"):
        append_to_vllm_pages_(q, k, v, TABLE, positions, pages, torch.arange(6), SECTIONS)
    with pytest.raises(TypeError, match="slot_mapping is list"):
        append_to_vllm_pages_(q, k, v, TABLE, positions, pages, [0, 1, 2, 3, 4], SECTIONS)


def page_table(lengths: list[int], page: int, pages: list[int]) -> dict[str, Tensor]:
    counts = [-(-length // page) for length in lengths]
    last = [length - (count - 1) * page for length, count in zip(lengths, counts)]
    given = {"kv_indices": pages[: sum(counts)], "kv_indptr": [0, *accumulate(counts)], "kv_last_page_len": last}
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in given.items()}


@pytest.mark.parametrize("layout", ("NHD", "HND"))
@pytest.mark.parametrize("pair", (False, True), ids=("one tensor", "pair"))
def test_flashinfer(layout: str, pair: bool) -> None:
    """Three requests, of which one appends nothing, and a padding token; lengths are those after the append."""
    page, lengths, new = 4, [9, 3, 5], [6, 0, 5]
    table = page_table(lengths, page, [6, 1, 4, 0, 5, 2])
    indptr = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
    q, k, v, positions = tokens(12, "flashinfer")
    expected_q, expected_k = rotated(q, k, v, positions)
    shape = (7, 2, page, KV_HEADS, DIM) if layout == "NHD" else (7, 2, KV_HEADS, page, DIM)
    cache = torch.full(shape, 7.0)
    append_to_flashinfer_pages_(
        q,
        k,
        v,
        TABLE,
        positions,
        cache.unbind(1) if pair else cache,
        indptr,
        **table,
        sections=SECTIONS,
        kv_layout=layout,
    )
    assert_same_bits(q, expected_q)
    rows = cache if layout == "NHD" else cache.transpose(2, 3)
    expected, token = torch.full((7, 2, page, KV_HEADS, DIM), 7.0), 0
    for request, count in enumerate(new):
        pages = table["kv_indices"][table["kv_indptr"][request] : table["kv_indptr"][request + 1]].tolist()
        for row in range(lengths[request] - count, lengths[request]):
            expected[pages[row // page], :, row % page] = torch.stack([expected_k[token], v[token]])
            token += 1
    assert token == 11
    assert_same_bits(rows.contiguous(), expected)


def test_flashinfer_slots_of_any_table() -> None:
    generator = numbers("page tables")
    for _ in range(50):
        page, requests = int(generator.integers(1, 6)), int(generator.integers(1, 6))
        lengths = generator.integers(1, 20, requests).tolist()
        new = [int(generator.integers(0, length + 1)) for length in lengths]
        pages = generator.permutation(200).tolist()
        table = page_table(lengths, page, pages)
        padding = int(generator.integers(0, 3))
        slots = flashinfer_slots(
            torch.tensor([0, *accumulate(new)]), **table, page_size=page, tokens=sum(new) + padding
        ).tolist()
        expected = []
        for request, count in enumerate(new):
            own = pages[int(table["kv_indptr"][request]) : int(table["kv_indptr"][request + 1])]
            expected += [
                own[row // page] * page + row % page for row in range(lengths[request] - count, lengths[request])
            ]
        assert slots == expected + [-1] * padding


def test_flashinfer_bad_tables() -> None:
    table = page_table([3], 4, [0])
    indptr = torch.tensor([0, 3])
    assert flashinfer_slots(torch.tensor([0, 5]), **table, page_size=4, tokens=5).tolist() == [-1, -1, 0, 1, 2]
    assert flashinfer_slots(indptr[:1], indptr[:0], indptr[:1], indptr[:0], 4, 2).tolist() == [-1, -1]
    # Pages that the table does not have are not replaced by ones that it has, on which others live.
    wrong = {"kv_indices": torch.tensor([3, 1]), "kv_last_page_len": torch.tensor([2])}
    for ends, found in (([0, 5], [12, 13, 14, 15, 4, 5, 6, 7] + [-1] * 10), ([-1, 1], [-1] * 4 + [12, 13])):
        count = len(found)
        given = {**wrong, "kv_indptr": torch.tensor(ends)}
        assert flashinfer_slots(torch.tensor([0, count]), **given, page_size=4, tokens=count).tolist() == found
    with pytest.raises(ValueError, match="one more than the 1 entries"):
        flashinfer_slots(indptr[:1], **table, page_size=4, tokens=3)
    with pytest.raises(TypeError, match="append_indptr is torch.float32"):
        flashinfer_slots(indptr.float(), **table, page_size=4, tokens=3)
    with pytest.raises(ValueError, match="page_size is 0"):
        flashinfer_slots(indptr, **table, page_size=0, tokens=3)
    q, k, v, positions = tokens(3, "bad")
    for cache, reason in (
        (torch.zeros(3, 4, KV_HEADS, DIM), "has 4 dimensions"),
        (torch.zeros(1, 2, 4, DIM), "has 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=reason):
            append_to_flashinfer_pages_(q, k, v, TABLE, positions, cache, indptr, **table, sections=SECTIONS)
    with pytest.raises(ValueError, match="kv_layout is 'HDN'"):
        append_to_flashinfer_pages_(
            q, k, v, TABLE, positions, torch.zeros(1, 2, 4, 2, DIM), indptr, **table, sections=SECTIONS, kv_layout="HDN"
        )


@pytest.mark.parametrize("kind", (StaticLayer, DynamicLayer))
def test_transformers_layers(kind: type) -> None:
    """Three appends leave a layer as `update` with rotated keys leaves another; what a dynamic layer gave stays."""
    mine, theirs, given = kind(max_cache_len=12), kind(max_cache_len=12), []
    for count in (5, 1, 6):
        q, k, v, positions = tokens(2 * count, (kind.__name__, count))
        expected_q, expected_k = rotated(q, k, v, positions)
        batched = [x.unflatten(0, (2, count)) for x in (q, k, v)]
        wanted = theirs.update(*(x.unflatten(0, (2, count)).transpose(1, 2) for x in (expected_k, v)))
        found = append_to_layer_(*batched, TABLE, positions, mine, SECTIONS)
        assert_same_bits(q, expected_q)
        for a, b in zip(found, wanted):
            assert_same_bits(a, b)
        assert found[0] is mine.keys and int(mine.get_seq_length()) == int(theirs.get_seq_length())
        given.append((found[0], found[0].clone()))
    if kind is DynamicLayer:
        for keys, then in given:
            assert_same_bits(keys, then, "keys that the layer held before")
    assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def appended(layer: DynamicLayer, count: int, key: object, batch: int = 1, backend: str = "auto") -> None:
    q, k, v, positions = tokens(batch * count, key)
    batched = [x.unflatten(0, (batch, count)) for x in (q, k, v)]
    append_to_layer_(*batched, TABLE, positions, layer, SECTIONS, backend=backend)


def test_a_dynamic_layer_is_not_copied_for_every_token() -> None:
    layer = DynamicLayer()
    appended(layer, 5, "first")
    moves, place = 0, layer.keys.data_ptr()
    for step in range(40):
        appended(layer, 1, step)
        moves, place = moves + (layer.keys.data_ptr() != place), layer.keys.data_ptr()
    assert layer.get_seq_length() == 45 and moves == 2


@pytest.mark.parametrize("way", ("crop", "share", "shallow copy", "deep copy", "roll back", "reorder"))
def test_rows_that_were_given_out_stay(way: str) -> None:
    """Two continuations of one beginning: neither sees the other's tokens, whatever they share."""
    layer = DynamicLayer()
    appended(layer, 5, "first")
    begun = layer.keys
    appended(layer, 2, "second")
    other, seen = DynamicLayer(), layer.keys
    then = seen.clone()
    if way == "crop":
        layer.crop(-1)
        other = layer
    elif way == "share":
        other.lazy_initialization(seen, layer.values)
        other.keys, other.values = layer.keys, layer.values
    elif way == "shallow copy":
        other = copy.copy(layer)
    elif way == "deep copy":
        other = copy.deepcopy(layer)
    elif way == "roll back":
        layer.keys, layer.values = begun, layer.values[:, :, :5]
        other = layer
    else:
        layer.reorder_cache(torch.tensor([0]))
        other = layer
    appended(other, 3, "third")
    theirs = other.keys.clone()
    appended(layer, 3, "fourth")
    assert_same_bits(seen, then, "what was given out before")
    if other is not layer:
        assert_same_bits(other.keys, theirs)
        assert not torch.equal(layer.keys, other.keys)


@each_backend
def test_inference_mode_may_end_between_two_tokens(backend: str) -> None:
    layer = DynamicLayer()
    with torch.inference_mode():
        appended(layer, 5, "first", backend=backend)
        then = layer.keys.clone()
    with torch.no_grad():
        appended(layer, 1, "second", backend=backend)
    assert torch.equal(layer.keys[:, :, :5], then)


def test_another_batch_is_refused() -> None:
    for layer in (DynamicLayer(), StaticLayer(max_cache_len=8)):
        appended(layer, 2, "first")
        with pytest.raises(ValueError, match="the layer holds a batch of 1, the tokens are of a batch of 2"):
            appended(layer, 2, "second", batch=2)
        assert int(layer.get_seq_length()) == 2


@pytest.mark.parametrize("way", ("spare", "copy", "static"))
def test_tokens_that_do_not_fit_a_layer(way: str) -> None:
    """The same errors for each way, before anything is stored; also where q is no view of all tokens."""
    layer = StaticLayer(max_cache_len=8) if way == "static" else DynamicLayer()
    appended(layer, 2, "first")
    if way == "copy":
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    before = layer.keys, layer.keys.clone()
    q, k, v, positions = tokens(2, "second")
    q, k, v = (x[None] for x in (q, k, v))

    def append(*qkv: Tensor) -> None:
        append_to_layer_(*qkv, TABLE, positions, layer, SECTIONS)

    with pytest.raises(ValueError, match="the layer holds 2 heads of 16, the tokens have 1 of 16"):
        append(q, k[:, :, :1], v[:, :, :1])
    with pytest.raises(TypeError, match="k is torch.bfloat16; it must be torch.float32, as the layer's keys"):
        append(q.bfloat16(), k.bfloat16(), v.bfloat16())
    for wrong in ((q, k, v[:, :1]), (q, k[:, :1], v[:, :1]), (q[..., :8], k, v)):
        with pytest.raises(ValueError, match="k like v"):
            append(*wrong)
    positions[0, 0] = 64
    with pytest.raises(ValueError, match="build a longer table"):
        append(q, k, v)
    assert layer.keys is before[0] and int(layer.get_seq_length()) == 2
    assert_same_bits(layer.keys, before[1])


def test_queries_that_are_no_view() -> None:
    q, k, v, positions = tokens(6, "view")
    q, k, v = (x.unflatten(0, (2, 3)) for x in (q, k, v))
    layer = DynamicLayer()
    with pytest.raises(ValueError, match=r"batch and tokens do not merge .* pass q.contiguous\(\)"):
        append_to_layer_(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, TABLE, positions, layer, SECTIONS)
    assert not layer.is_initialized


def test_a_refused_first_append_leaves_a_layer_without_a_shape() -> None:
    layer = StaticLayer(max_cache_len=8)
    q, k, v, positions = tokens(6, "refused")
    q, k, v = (x.unflatten(0, (2, 3)) for x in (q, k, v))
    with pytest.raises(ValueError, match="build a longer table"):
        append_to_layer_(q, k, v, TABLE, positions + 64, layer, SECTIONS)
    assert not layer.is_initialized and layer.keys is None
    appended(layer, 3, "another batch")
    assert layer.keys.shape[0] == 1 and int(layer.get_seq_length()) == 3


def test_no_tokens_fix_no_batch() -> None:
    layer = DynamicLayer()
    appended(layer, 0, "nothing")
    appended(layer, 3, "something", batch=2)
    assert layer.keys.shape == (2, KV_HEADS, 3, DIM)


def test_a_full_static_layer_is_left_alone() -> None:
    layer = StaticLayer(max_cache_len=4)
    q, k, v, positions = (x[None] if x.dim() == 3 else x for x in tokens(3, "full"))
    append_to_layer_(q, k, v, TABLE, positions, layer, SECTIONS)
    before, query = layer.keys.clone(), q.clone()
    with pytest.raises(ValueError, match="holds 3 of 4 tokens; 3 more do not fit: .* max_cache_len ≥ 6"):
        append_to_layer_(q, k, v, TABLE, positions, layer, SECTIONS)
    assert_same_bits(layer.keys, before)
    assert_same_bits(q, query)
    assert int(layer.get_seq_length()) == 3


def test_slots_beyond_a_page_are_dropped() -> None:
    """What a GPU relies on, where a static layer's length is not read: the next row of the batch is not overwritten."""
    from vpt_kernels.caches import page_slots

    slots = page_slots(2, torch.tensor(3), 3, 4, torch.device("cpu"))
    assert [slot if slot >= 0 else -1 for slot in slots.tolist()] == [3, -1, -1, 7, -1, -1]


def test_other_layers_are_refused() -> None:
    q, k, v, positions = (x[None] if x.dim() == 3 else x for x in tokens(3, "other"))
    with pytest.raises(TypeError, match="layer is a DynamicCache"):
        append_to_layer_(q, k, v, TABLE, positions, DynamicCache(), SECTIONS)
    with pytest.raises(ValueError, match="q has 3 dimensions"):
        append_to_layer_(q[0], k, v, TABLE, positions, DynamicLayer(), SECTIONS)
