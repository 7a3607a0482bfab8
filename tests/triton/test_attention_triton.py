"""The model's attention kernel, split along the keys, against a float64 oracle written as one loop per query."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from tests.helpers import assert_same_bits, assert_twice_as_good, each_dtype, virtual_bytes
from tests.model.attention_inputs import NAN, Call, make, oracle
from tests.triton.watch import Allocations, Launches, Permuted, outputs
from vpt_model.network import attention, attention_triton
from vpt_model.network.attention_triton import APPEND, DECODE, FLOAT32, launch_of


def run(call: Call) -> Tensor:
    return attention_triton.attend(**vars(call))


def check(call: Call) -> Tensor:
    out = run(call)
    eager = oracle(call, call.q.dtype if call.q.dtype != torch.float16 else torch.float32).to(call.q.dtype)
    assert_twice_as_good(call.real(out), eager, oracle(call))
    for rows, count in zip(out, call.counts.tolist()):
        assert not rows[: len(rows) - count].any(), "rows of padding"
    return out


@each_dtype
def test_decode(dtype):
    check(make([1, 1, 1], [0, 63, 150], 1, dtype=dtype))


@each_dtype
def test_append(dtype):
    """More query rows than one block has, counts of which none is the bucket's."""
    check(make([9, 0, 23], [40, 7, 0], 24, dtype=dtype, capacity=100))


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 192])
def test_splits_end_anywhere(length):
    check(make([1], [length - 1], 1, dtype=torch.bfloat16, capacity=length, key=length))
    # Heads enough that the mean error is one: a float32 score's rounding is shared by all that follows from it.
    check(make([2], [length - 2], 4, heads=(24, 2), dim=64, capacity=length, key=length))


@pytest.mark.parametrize("heads, dim", [((12, 2), 128), ((7, 1), 16), ((4, 4), 80), ((28, 4), 32), ((1, 1), 1)])
def test_head_groupings(heads, dim):
    check(make([2, 3], [70, 5], 4, heads=heads, dim=dim, capacity=80, dtype=torch.bfloat16))


def test_many_splits_of_many_tokens():
    """The table's line for long chunks, with more than one split and several blocks of queries."""
    launch = APPEND._replace(split=64)
    call = make([30], [120], 32, dtype=torch.bfloat16, capacity=160)
    assert launch_of(torch.bfloat16, 32 * 3) is APPEND
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_triton, "APPEND", launch)
        check(call)
    check(call)


def test_the_table():
    for launch in (DECODE, APPEND, FLOAT32):
        assert launch.split % launch.keys == 0
    assert launch_of(torch.bfloat16, 6) is launch_of(torch.float16, 16) is DECODE
    assert launch_of(torch.float16, 17) is APPEND and launch_of(torch.float32, 1) is FLOAT32


@each_dtype
@pytest.mark.parametrize("bucket", [8, 24])
def test_a_row_does_not_depend_on_the_bucket_or_the_neighbours(dtype, bucket):
    alone = make([5], [90], 8, dtype=dtype, key="row")
    expected = alone.real(run(alone))
    assert_same_bits(alone.real(run(alone)), expected, "run again")
    q = torch.full((2, bucket, *alone.q.shape[2:]), NAN, dtype=dtype)
    q[1, -8:] = alone.q[0]
    beside = replace(
        alone,
        q=q,
        starts=torch.cat([alone.starts] * 2),
        past=torch.tensor([0, 90], dtype=torch.int32),
        counts=torch.tensor([bucket, 5], dtype=torch.int32),
    )
    found = run(beside)[1, -5:]
    if bucket == 8:
        assert_same_bits(found, expected, "beside a row of NaN")
    # numpy's product rounds a row differently in another place of the tile.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 4)


def test_a_chunk_is_its_tokens_one_by_one():
    call = make([6], [61], 6, capacity=80)
    together = call.real(run(call))
    for i in range(6):
        one = replace(call, q=call.q[:, i : i + 1], past=call.past + i, counts=torch.ones_like(call.counts))
        torch.testing.assert_close(run(one)[0, 0], together[i], rtol=1e-5, atol=1e-6)


def test_the_composed_form_agrees():
    """It is what the buckets are tested with where there is no GPU."""
    call = make([9, 0, 1], [40, 7, 99], 12, capacity=100)
    torch.testing.assert_close(attention._composed(**vars(call)), run(call), rtol=1e-5, atol=1e-6)


def test_lengths_that_lie_cannot_leave_the_row():
    call = make([1], [9], 1, capacity=10, dtype=torch.bfloat16)
    assert run(call).isfinite().all()
    assert run(replace(call, past=torch.tensor([500], dtype=torch.int32))).isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_scores_that_are_nan_write_what_others_write(monkeypatch, dtype):
    """Otherwise the merge would read what was in the memory before; other heads are as they were."""
    made, empty = [], torch.empty

    def stale(*shape: object, **options: object) -> torch.Tensor:
        made.append(empty(*shape, **options).fill_(7.0))
        return made[-1]

    call = make([1], [150], 1, heads=(6, 2), dtype=dtype)
    monkeypatch.setattr(torch, "empty", stale)
    expected = run(call).unflatten(2, (6, -1))
    unwritten = [int((tensor == 7.0).sum()) for tensor in made]
    made.clear()
    call.keys[int(call.starts) + 3, 0] = NAN
    found = run(call).unflatten(2, (6, -1))
    assert [int((tensor == 7.0).sum()) for tensor in made] == unwritten
    assert found[:, :, :3].isnan().all()
    assert_same_bits(found[:, :, 3:], expected[:, :, 3:])


def test_addresses_are_64_bits():
    """Slots so far apart that the last ones lie beyond 2^31 elements."""
    stride, slots = 1 << 28, 12
    memory = virtual_bytes(slots * stride * 2).view(torch.bfloat16)
    far = make([2], [10], 2, heads=(2, 1), dim=16, capacity=slots, dtype=torch.bfloat16)
    near = [x[slots : 2 * slots] for x in (far.keys, far.values)]
    keys = memory.as_strided((slots, 1, 16), (stride, 16, 1))
    values = memory.as_strided((slots, 1, 16), (stride, 16, 1), 64)
    for wide, narrow in zip((keys, values), near):
        wide.copy_(narrow)
    moved = replace(far, keys=keys, values=values, starts=torch.zeros_like(far.starts))
    assert_same_bits(run(moved), run(far))


def test_one_launch_and_the_documented_workspace():
    call = make([3], [90], 4, dtype=torch.bfloat16, capacity=200)
    with Launches() as launches, Allocations() as seen:
        run(call)
    rows = 4 * 6 // 2
    assert launches.grids == [("split_kernel", (-(-rows // DECODE.rows), 2, 4))]
    kept = 2 * 1 * 4 * DECODE.rows * 4
    assert sorted(outputs(seen)) == sorted([4 * 6 * 16 * 2, kept * 16, kept * 2])


@each_dtype
def test_whoever_is_last_merges_the_same_way(dtype):
    """Several blocks of queries, several splits, a bucket whose first block is padding; tickets that are used again."""
    call = make([9, 0, 23], [40, 7, 130], 24, dtype=dtype, capacity=180)
    tickets = torch.zeros(3 * 24 * 6, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_triton, "APPEND", APPEND._replace(split=64, rows=16))
        expected = check(call)
        for seed in range(3):
            with Permuted(seed):
                assert_same_bits(attention_triton.attend(**vars(call), tickets=tickets), expected, "in another order")
            assert not tickets.any()


def test_it_is_launched_on_the_queries_device(monkeypatch):
    """As the operators are: where another device is current, its stream would be the wrong one."""
    seen = []

    @contextmanager
    def guard(tensor):
        assert tensor is call.q
        seen.append("enter")
        yield
        seen.append("leave")

    call = make([1], [5], 1, heads=(6, 2), dim=24, capacity=64, dtype=torch.float32)
    monkeypatch.setattr(attention_triton, "on_device", guard)
    with Launches() as launches:
        launch = GridExecutor.__call__
        monkeypatch.setattr(GridExecutor, "__call__", lambda *a, **k: (seen.append("launch"), launch(*a, **k))[1])
        attention_triton.attend(**vars(call))
    assert seen == ["enter", "launch", "leave"] and len(launches.grids) == 1
