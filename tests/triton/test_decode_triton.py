"""The decode layer's kernels against float64, with 1 to 8 rows, every split and every order of the programs."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits, assert_twice_as_good, each_dtype, linear, normal
from tests.triton.decode_inputs import NAN, make
from tests.triton.watch import Allocations, Launches, Permuted, outputs
from vpt_kernels import append_visual_kv
from vpt_model.network.decode import MOST_ROWS, attention, head, linear_add, norm_linear, norm_swiglu, reference
from vpt_model.network.decode.products import FLOAT32, ONE_ROW, ROWS, launch_of

EPS = 1e-6
each_rows = pytest.mark.parametrize("rows", [1, 2, 7, 8])


def tickets() -> Tensor:
    return torch.zeros(4096, dtype=torch.int32)


def weights(outputs: int, columns: int, dtype: torch.dtype, key: str = "w") -> Tensor:
    return normal(outputs, columns, key=key, dtype=dtype, scale=columns**-0.5)


def check(kernel, composition, draw) -> None:
    """By the rule of twice PyTorch's error; float16 products sum in float32 there, as on a GPU.

    Eight draws are judged together: few rows or few outputs say little, and the error of a row's norm is common to it.
    """
    draws = [draw(f"{number}") for number in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "linear", linear)
        eager = [composition(*arguments) for arguments in draws]
    wide = [[x.double() if isinstance(x, Tensor) else x for x in arguments] for arguments in draws]
    ours = torch.cat([kernel(*arguments) for arguments in draws])
    assert_twice_as_good(ours, torch.cat(eager).to(ours.dtype), torch.cat([composition(*given) for given in wide]))


def test_the_table():
    assert launch_of(torch.empty(1, 3)) is launch_of(torch.empty(1, 3, dtype=torch.float16)) is ONE_ROW
    assert launch_of(torch.empty(8, 3, dtype=torch.bfloat16)) is ROWS and launch_of(torch.empty(2, 3)) is FLOAT32
    assert ROWS.rows >= MOST_ROWS <= FLOAT32.rows
    for rows in (0, 9):
        with pytest.raises(ValueError, match=f"{rows} rows were given; these products are for 1 to 8"):
            launch_of(torch.empty(rows, 3))


@each_dtype
@each_rows
@pytest.mark.parametrize("columns, outputs", [(600, 40), (37, 19)])
def test_norm_linear(dtype, rows, columns, outputs):
    def draw(key: str) -> tuple[Tensor | float, ...]:
        x, norm = normal(rows, columns, key=f"x{key}", dtype=dtype), normal(columns, key=f"n{key}", dtype=dtype)
        return x, norm, EPS, weights(outputs, columns, dtype, f"w{key}"), normal(outputs, key=f"b{key}", dtype=dtype)

    check(norm_linear.norm_linear, reference.norm_linear, draw)


@each_dtype
@each_rows
@pytest.mark.parametrize("columns, outputs", [(600, 40), (37, 19)])
def test_norm_swiglu(dtype, rows, columns, outputs):
    def draw(key: str) -> tuple[Tensor | float, ...]:
        x, norm = normal(rows, columns, key=f"x{key}", dtype=dtype), normal(columns, key=f"n{key}", dtype=dtype)
        return x, norm, EPS, weights(2 * outputs, columns, dtype, f"w{key}")

    check(norm_swiglu.norm_swiglu, reference.norm_swiglu, draw)


@each_dtype
@each_rows
@pytest.mark.parametrize("programs", [1, 6, 512], ids=["one split", "two splits", "all splits"])
def test_linear_add(monkeypatch, dtype, rows, programs):
    monkeypatch.setattr(linear_add, "PROGRAMS", programs)
    monkeypatch.setattr(linear_add, "STEPS", 1)
    columns, outputs, taken = 1500, 24, tickets()

    def draw(key: str) -> tuple[Tensor, ...]:
        x, residual = (normal(rows, n, key=f"{name}{key}", dtype=dtype) for name, n in (("x", columns), ("r", outputs)))
        return x, weights(outputs, columns, dtype, f"w{key}"), residual

    x, weight, residual = draw("")
    with Launches() as launches:
        out = linear_add.linear_add(x, weight, residual, taken)
    launch = launch_of(x)
    blocks = -(-outputs // launch.outputs)
    assert launches.grids == [("linear_add_kernel", (blocks, _splits(launch, columns, programs // blocks)))]
    assert not taken.any()
    check(lambda *given: linear_add.linear_add(*given, taken), reference.linear_add, draw)
    for seed in range(2):
        with Permuted(seed):
            assert_same_bits(linear_add.linear_add(x, weight, residual, taken), out, "in another order")


def _splits(launch, columns: int, wanted: int) -> int:
    steps = -(-columns // launch.step)
    wanted = max(1, min(wanted, columns // launch.step))
    return -(-steps // -(-steps // wanted))


def test_splits_depend_on_shapes_alone():
    """2B and 7B: every multiprocessor has something to do, and no split is shorter than two steps."""
    for hidden, wide in ((1536, 8960), (3584, 18944)):
        for launch in (ONE_ROW, ROWS, FLOAT32):
            for columns in (hidden, wide):
                splits = linear_add.splits_of(launch, columns, hidden)
                assert 1 <= splits <= columns // (2 * launch.step)
                assert splits * hidden // launch.outputs <= max(512, hidden // launch.outputs)
    assert linear_add.splits_of(ONE_ROW, 8960, 1536) == 2 and linear_add.splits_of(ROWS, 8960, 1536) == 5


@each_dtype
@each_rows
@pytest.mark.parametrize("vocabulary", [300, 5])
def test_head(monkeypatch, dtype, rows, vocabulary):
    monkeypatch.setattr(head, "TILES", 3)
    columns, taken = 70, tickets()

    def draw(key: str) -> tuple[Tensor, Tensor]:
        weight = weights(vocabulary, columns, dtype, f"w{key}")
        weight[3] = weight[1] = 3 * weight[1]  # two tokens that are alike
        return normal(rows, columns, key=f"x{key}", dtype=dtype), weight

    x, weight = draw("")
    logits, tokens = head.head(x, weight, taken)
    rounded = logits.to(dtype)
    assert_same_bits(rounded.float(), logits, "logits in the model's dtype")
    check(lambda *given: head.head(*given, taken)[0].to(dtype), lambda *given: reference.head(*given)[0], draw)
    assert tokens.tolist() == reference.greedy(logits).tolist() and not taken.any()
    with Permuted(1):
        for again, first in zip(head.head(x, weight, taken), (logits, tokens)):
            assert_same_bits(again, first, "in another order")


@pytest.mark.parametrize("rows", [1, 3])
def test_head_of_ties_infinities_and_nan(monkeypatch, rows):
    monkeypatch.setattr(head, "TILES", 2)
    weight = torch.zeros(60, 4)
    weight[[17, 41, 58], 0] = 1.0
    weight[[9, 50], 1] = float("inf")
    weight[55, 2] = NAN
    x = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0]])
    # 0 · inf is NaN, so each case has weights of its own.
    for case, columns, expected in ((0, [0], 17), (3, [0], 0), (1, [0, 1], 9), (2, [2], -1)):
        logits, tokens = head.head(x[case, columns].expand(rows, -1).contiguous(), weight[:, columns], tickets())
        assert tokens.tolist() == [expected] * rows == reference.greedy(logits).tolist()


def attend(step, taken: Tensor) -> tuple[Tensor, list]:
    arguments = step.arguments()
    return attention.attend(*arguments, taken), arguments


def check_attention(step, seeds=(0,)) -> Tensor:
    taken, expected = tickets(), step.arguments()
    out, arguments = attend(step, taken)
    eager = reference.attend(*expected)
    assert_twice_as_good(out, eager, reference.attend(*step.arguments(torch.float64)))
    for cache, theirs in zip(arguments[5:7], expected[5:7]):
        assert_same_bits(cache, theirs, "caches")
    assert not out[step.counts == 0].any() and not taken.any()
    for seed in seeds:
        with Permuted(seed):
            again, others = attend(step, taken)
        assert_same_bits(again, out, "in another order")
        assert_same_bits(others[5], arguments[5], "keys in another order")
        assert not taken.any()
    return out


@each_dtype
@pytest.mark.parametrize("past", [0, 1, 63, 64, 65, 127, 128, 199])
def test_attention_of_every_split(dtype, past):
    check_attention(make([past], dtype=dtype, key=past))


@each_dtype
def test_attention_of_ragged_rows_and_padding(dtype):
    step = make([70, 0, 5, 199, 64, 130, 12, 3], dtype=dtype, padding=(2, 6))
    together = check_attention(step, seeds=(0, 1, 2))
    alone = make([70, 0, 5, 199, 64, 130, 12, 3], dtype=dtype, padding=(0, 1, 2, 4, 5, 6, 7))
    assert_same_bits(check_attention(alone)[3], together[3], "the same row beside padding")


@pytest.mark.parametrize("heads, dim", [((12, 2), 128), ((28, 4), 64), ((7, 1), 16), ((4, 4), 80), ((17, 1), 8)])
def test_attention_of_head_groupings(heads, dim):
    check_attention(make([66, 9], heads=heads, dim=dim, capacity=80, dtype=torch.bfloat16))


@each_dtype
def test_the_cache_holds_the_operators_bits(dtype):
    step = make([3, 40, 0], dtype=dtype)
    _, (_, _, _, _, slots, keys, values, *_) = attend(step, tickets())
    q, k, v = step.qkv.unflatten(1, (-1, 32)).split([6, 2, 2], dim=1)
    _, _, _, _, _, own_keys, own_values, *_ = step.arguments()
    append_visual_kv(
        q, k, v, step.table, step.positions, slots, own_keys, own_values, sections=step.sections, backend="triton"
    )
    assert_same_bits(keys, own_keys, "keys")
    assert_same_bits(values, own_values, "values")


def test_lengths_and_positions_that_lie_cannot_leave_the_row():
    step = make([9], capacity=10, dtype=torch.bfloat16)
    step.past.fill_(500)
    step.positions.fill_(100_000)
    out, (*_, keys, _, _, _, _, _) = attend(step, tickets())
    assert out.isfinite().all()
    step.slots.fill_(len(step.keys))
    _, arguments = attend(step, tickets())
    assert_same_bits(arguments[5], step.keys, "a slot behind the last one")


def test_one_launch_each_and_the_documented_workspace():
    step, taken = make([9, 99], dtype=torch.bfloat16), tickets()
    x = normal(2, 2600, key="x", dtype=torch.bfloat16)
    weight, norm = weights(32, 2600, torch.bfloat16), normal(2600, key="n", dtype=torch.bfloat16)
    for call, grid, sizes in (
        (lambda: attend(step, taken), (4, 4), [2 * 192 * 2, 4 * 2 * 2 * 4 * 16 * 32, 4 * 2 * 2 * 4 * 16 * 2]),
        (lambda: norm_linear.norm_linear(x, norm, EPS, weight, norm), (2,), [2 * 32 * 2]),
        (lambda: norm_swiglu.norm_swiglu(x, norm, EPS, weight), (1,), [2 * 16 * 2]),
        (lambda: linear_add.linear_add(x, weight, x[:, :32].contiguous(), taken), (2, 4), [2 * 32 * 2, 4 * 2 * 32 * 4]),
        (lambda: head.head(x, weight, taken), (1,), [2 * 32 * 4, 2 * 4, 2 * 4, 2 * 8]),
    ):
        with Launches() as launches, Allocations() as seen, ExitStack():
            call()
        assert [shape for _, shape in launches.grids] == [grid]
        assert sorted(outputs(seen)) == sorted(sizes)
