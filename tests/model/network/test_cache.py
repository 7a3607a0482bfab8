"""The key/value cache: append, truncate, fork and release; nothing is copied and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from tests.model.inputs import appended, tiny_config, tiny_model
from vpt_model.config import PRESETS
from vpt_model.network.cache import KVCache


def text(count, start=0):
    return torch.arange(start, start + count).expand(3, -1)


def feed(cache, ids, start=None):
    """Append token ids to one cache as text; returns the hidden states."""
    language = tiny_model().language
    ids = torch.tensor(ids)
    begin = cache.next_position if start is None else start
    return appended(language, language.embed(ids), text(len(ids), begin), [cache], [len(ids)])


def snapshot(cache):
    return cache.keys.clone(), cache.values.clone(), cache.length, cache.next_position


def same(cache, before):
    after = snapshot(cache)
    return all(torch.equal(a, b) for a, b in zip(after[:2], before[:2], strict=True)) and after[2:] == before[2:]


@pytest.mark.parametrize(("preset", "dtype"), [("tiny", torch.float32), ("2b-slice", torch.bfloat16)])
def test_bytes_are_exactly_the_tokens(preset, dtype):
    config = PRESETS[preset]
    cache = KVCache(config, 31, dtype)
    per_token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize * 2
    assert cache.bytes_per_token == per_token
    assert cache.nbytes == 31 * per_token
    assert cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes() == 31 * per_token


def test_published_bytes_per_token():
    assert KVCache(PRESETS["2b"], 1, torch.bfloat16).bytes_per_token == 28672
    assert KVCache(PRESETS["7b"], 1, torch.bfloat16).bytes_per_token == 57344


def test_starts_zeroed():
    cache = KVCache(tiny_config(), 8)
    assert not cache.keys.any()
    assert not cache.values.any()
    assert (cache.length, cache.next_position, cache.capacity) == (0, 0, 8)


def test_buffers_can_be_written_outside_of_inference_mode():
    """They outlive the call that makes them: at first, side by side, after growing and of a fork."""
    with torch.inference_mode():
        cache = KVCache(tiny_config(), 32, rows=4)
        made = [cache.keys, cache.values]
        made += [x for c in KVCache.side_by_side(2, tiny_config(), 8, torch.float32, "cpu") for x in (c.keys, c.values)]
        feed(cache, [1, 2, 3, 4])
        fork = cache.fork(8)
        cache.reserve(8)
        made += [fork.keys, fork.values, cache.keys, cache.values]
    assert not any(buffer.is_inference() for buffer in made) and len({id(buffer) for buffer in made}) == len(made)


@pytest.mark.parametrize("capacity", [0, -1, 4097])
def test_capacity_out_of_range(capacity):
    with pytest.raises(ValueError, match=f"capacity is {capacity}.*4096"):
        KVCache(tiny_config(), capacity)


def test_append_writes_its_rows_only_and_never_moves():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    cache.keys[:, 3:], cache.values[:, 3:] = 123.0, -321.0
    pointers, before = (cache.keys.data_ptr(), cache.values.data_ptr()), snapshot(cache)
    feed(cache, [4, 5])
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == pointers
    assert (cache.length, cache.next_position) == (5, 5)
    for buffer, old, canary in ((cache.keys, before[0], 123.0), (cache.values, before[1], -321.0)):
        assert torch.equal(buffer[:, :3], old[:, :3])
        assert (buffer[:, 5:] == canary).all()
        assert not (buffer[:, 3:5] == canary).any()


def test_stale_rows_are_never_read():
    clean, dirty = (tiny_model().language.new_cache(12) for _ in range(2))
    dirty.keys.fill_(float("nan"))
    dirty.values.fill_(float("nan"))
    for ids in ([1, 2, 3], [4, 5], [6]):
        assert torch.equal(feed(clean, ids), feed(dirty, ids))


def test_truncate_and_continue_equals_never_having_been_there():
    cache, other = (tiny_model().language.new_cache(12) for _ in range(2))
    feed(cache, [1, 2, 3])
    feed(cache, [9, 9, 9, 9])
    cache.truncate(3, 3)
    feed(other, [1, 2, 3])
    assert torch.equal(feed(cache, [4, 5]), feed(other, [4, 5]))


@pytest.mark.parametrize("length", [-1, 4])
def test_truncate_out_of_range(length):
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    with pytest.raises(ValueError, match=f"cannot truncate to {length} tokens; the cache holds 3"):
        cache.truncate(length, 0)


def test_full_cache_names_length_capacity_and_remedy():
    cache = tiny_model().language.new_cache(4)
    feed(cache, [1, 2, 3])
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"holds 3 tokens and 2 more make 5.*capacity is 4.*capacity >= 5"):
        feed(cache, [4, 5])
    assert same(cache, before)
    feed(cache, [4])
    assert cache.length == cache.capacity


def test_one_full_cache_leaves_the_whole_batch_untouched():
    language = tiny_model().language
    roomy, full = language.new_cache(9), language.new_cache(2)
    before = [snapshot(cache) for cache in (roomy, full)]
    embeds, positions = language.embed(torch.arange(6)), torch.cat([text(3), text(3)], 1)
    with pytest.raises(ValueError, match="capacity is 2"):
        language.forward(embeds, positions, [roomy, full], [3, 3])
    assert same(roomy, before[0])
    assert same(full, before[1])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_forks_read_the_prefix_where_it_is_and_all_go_on():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    before = [buffer[:, :3].clone() for buffer in (cache.keys, cache.values)]
    forks = [cache.fork(4), cache.fork(4)]
    for fork in forks:
        (rows,) = fork.shared
        assert (rows.keys.data_ptr(), rows.values.data_ptr()) == (cache.keys.data_ptr(), cache.values.data_ptr())
        assert fork.nbytes == 4 * cache.bytes_per_token and (fork.length, fork.next_position) == (3, 3)
    for tail, one in (([4, 5], cache), ([6, 7, 8], forks[0]), ([9], forks[1])):
        whole = tiny_model().language.new_cache(12)
        feed(whole, [1, 2, 3])
        close(feed(one, tail), feed(whole, tail))
        assert one.length == whole.length == 3 + len(tail)
    assert all(torch.equal(buffer[:, :3], old) for buffer, old in zip((cache.keys, cache.values), before))


@pytest.mark.parametrize("length", range(7))
def test_truncating_never_touches_what_others_read(length):
    """Into the own tail, to its begin, into borrowed rows: the fork goes on, its parent and sibling see nothing."""
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    fork = cache.fork(5)
    feed(fork, [4, 5, 6])
    inner = fork.fork(5)
    fork.truncate(length, length)
    cache.truncate(2, 2)
    for one, past in ((fork, [1, 2, 3, 4, 5, 6][:length]), (inner, [1, 2, 3, 4, 5, 6]), (cache, [1, 2])):
        whole = tiny_model().language.new_cache(12)
        if past:
            feed(whole, past)
        one.reserve(2)
        close(feed(one, [7, 8]), feed(whole, [7, 8]))


def test_rows_are_written_again_once_nobody_reads_them():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    pointer, fork = cache.keys.data_ptr(), cache.fork(2)
    inner = fork.fork(2)
    del fork
    cache.truncate(0, 0)
    assert cache.keys.data_ptr() != pointer and cache.shared == (), "the fork's fork reads them"
    feed(cache, [1, 2, 3])
    pointer, fork = cache.keys.data_ptr(), cache.fork(2)
    del fork, inner
    cache.truncate(0, 0)
    assert cache.keys.data_ptr() == pointer


def test_it_grows_by_buffers_and_copies_nothing():
    cache, whole = KVCache(tiny_config(), 64, rows=3), tiny_model().language.new_cache(64)
    pointers = []
    for ids in ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11]):
        cache.reserve(len(ids))
        close(feed(cache, ids), feed(whole, ids))
        pointers.append([rows.keys.data_ptr() for rows in cache.shared])
    assert [len(held) for held in pointers] == [0, 1, 2, 2] and pointers[2][:1] == pointers[1]
    assert [rows.keys.shape[1] for rows in cache.shared] == [3, 1]
    assert cache.nbytes == (3 + 6 + cache.rows) * cache.bytes_per_token
    keys, values = cache.gather()
    close(keys, whole.keys[:, :11])
    close(values, whole.values[:, :11])
    with pytest.raises(ValueError, match=r"call reserve\(20\)"):
        cache.slots(20)
    with pytest.raises(ValueError, match="capacity is 64"):
        cache.reserve(54)


def test_slots_and_advance_keep_slot_and_position_apart():
    cache = KVCache(tiny_config(), 30)
    assert cache.slots(20).tolist() == list(range(20))
    cache.advance(20, 5)
    assert cache.slots(2).tolist() == [20, 21]
    assert cache.next_position == 5
    with pytest.raises(ValueError, match="cannot append -1"):
        cache.slots(-1)
