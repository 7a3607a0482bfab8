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


def test_fork_shares_the_prefix_and_owns_the_tail():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    before = snapshot(cache)
    fork = cache.fork()
    assert (fork.keys.data_ptr(), fork.values.data_ptr()) == (cache.keys.data_ptr(), cache.values.data_ptr())
    whole = tiny_model().language.new_cache(12)
    feed(whole, [1, 2, 3])
    assert torch.equal(feed(fork, [4, 5]), feed(whole, [4, 5]))
    assert (fork.length, fork.next_position) == (5, 5)
    assert (cache.length, cache.next_position) == (3, 3)
    assert torch.equal(cache.keys[:, :3], before[0][:, :3])
    fork.truncate(3, 3)
    with pytest.raises(ValueError, match="first 3 belong to the cache"):
        fork.truncate(2, 2)


def test_parent_waits_for_its_fork():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    fork = cache.fork()
    feed(fork, [4, 5])
    before = snapshot(cache)
    for action in (lambda: feed(cache, [6]), lambda: cache.truncate(1, 1), cache.fork):
        with pytest.raises(ValueError, match=r"release the fork or use fork\(copy=True\)"):
            action()
    assert same(cache, before)
    independent = cache.fork(copy=True)
    fork.release()
    assert torch.equal(feed(cache, [6, 7]), feed(independent, [6, 7]))


def test_released_fork_is_dead():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    fork = cache.fork()
    fork.release()
    before = snapshot(cache)
    for action in (lambda: feed(fork, [4]), lambda: fork.truncate(3, 3), fork.fork, fork.release):
        with pytest.raises(ValueError, match="released fork"):
            action()
    assert same(cache, before)


def test_only_the_innermost_fork_can_be_released():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    fork = cache.fork()
    feed(fork, [4])
    inner = fork.fork()
    with pytest.raises(ValueError, match="cannot release a cache while its fork is live"):
        fork.release()
    with pytest.raises(ValueError, match="first 4 belong"):
        inner.truncate(3, 3)
    inner.release()
    fork.release()
    feed(cache, [5])
    with pytest.raises(ValueError, match="owns its buffers"):
        cache.release()


def test_copied_fork_lives_on_its_own():
    cache = tiny_model().language.new_cache(12)
    feed(cache, [1, 2, 3])
    cache.keys[:, 3:] = 55.0
    fork = cache.fork(copy=True)
    assert fork.keys.data_ptr() != cache.keys.data_ptr()
    assert torch.equal(fork.keys[:, :3], cache.keys[:, :3])
    assert torch.equal(fork.values[:, :3], cache.values[:, :3])
    assert not fork.keys[:, 3:].any()
    assert fork.nbytes == cache.nbytes
    before = snapshot(cache)
    fork.truncate(0, 0)
    feed(fork, [7, 8, 9, 10])
    assert same(cache, before)


def test_slots_and_advance_keep_slot_and_position_apart():
    cache = KVCache(tiny_config(), 30)
    assert cache.slots(20).tolist() == list(range(20))
    cache.advance(20, 5)
    assert cache.slots(2).tolist() == [20, 21]
    assert cache.next_position == 5
    with pytest.raises(ValueError, match="cannot append -1"):
        cache.slots(-1)
