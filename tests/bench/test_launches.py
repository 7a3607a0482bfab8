"""What the engine asks of a GPU keeps to its budgets; and the pretended GPU sees what it should."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.jit import JITFunction

from bench import launches
from bench.gpu import engine as gpu_engine
from bench.launches import counts
from bench.launches.pretended import DEVICE, Pretended, Tally
from tests.model.inputs import tiny_model
from vpt_kernels import append_visual_kv, rotary_table
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import PRESETS
from vpt_model.engine import Engine
from vpt_model.text.tokens import Tokenizer

BUDGETS = launches.budgets()
THEIRS, COUNTED_WITH = ("look, dino", "look, sam"), "5.17.0"
"""Looks through encoders of transformers, and the version whose kernels were counted; later ones may need fewer."""


@pytest.mark.parametrize("preset", counts.PRESETS_COUNTED)
def test_budgets(preset):
    found = {name: launches.totals(tally) for name, tally in counts.counts(preset).items()}
    budgets = deepcopy(BUDGETS[preset])
    if transformers.__version__ != COUNTED_WITH:
        for look, number in product(THEIRS, ("kernels", "megabytes")):
            assert found[look].pop(number) <= budgets[look].pop(number)
    assert found == budgets, (
        "run `python -m bench launches --write` and give the CHANGELOG a row with what was before and after"
    )


@pytest.mark.parametrize("preset", counts.PRESETS_COUNTED)
def test_a_look_is_two_replays_behind_each_other(preset):
    """The host launches nothing between them, and waits for nothing but the first token."""
    looks = [row for name, row in BUDGETS[preset].items() if name.startswith("look")]
    assert len(looks) == 5
    for row in looks:
        assert (row["replays"], row["between"], row["waits"], row["pageable"]) == (2, 0, 1, 0)


@pytest.mark.parametrize("preset", counts.PRESETS_COUNTED)
def test_a_sampled_token_asks_the_host_for_nothing_more(preset):
    """One replay, one wait, a step behind, and no copy to the device: as a token that is the most probable one."""
    greedy, sampled = (BUDGETS[preset][name] for name in ("decoded token", "sampled token"))
    asked = ("replays", "between", "waits", "uploads", "pageable", "downloads")
    assert [sampled[name] for name in asked] == [greedy[name] for name in asked] == [1, 0, 1, 0, 0, 1]


def test_the_page_holds_the_budgets():
    assert launches.PAGE.read_text() == launches.page(BUDGETS)


@pytest.mark.parametrize("preset", counts.PRESETS_COUNTED)
def test_a_token_reads_the_weights_once(preset):
    """And beside them little: three hundred tokens' keys and values, one row of everything else."""
    shapes = expected_shapes(PRESETS[preset]).items()
    used = [shape for name, shape in shapes if name.startswith(("model.layers", "lm_head", "model.norm"))]
    weights = sum(2 * torch.Size(shape).numel() for shape in used) / 1e6
    assert weights < BUDGETS[preset]["decoded token"]["megabytes"] < weights * 1.02


@pytest.mark.parametrize("answer", ["clip", "region:x3,y3,x3,y3"])
def test_looks_are_timed_over_the_span_that_is_counted(answer, monkeypatch):
    """From the token that ends the round; by a clock that ticks at every event."""
    engine = Engine(tiny_model(), Tokenizer.byte_level(320, "clip"), capacity=1024)
    ticks, stream = [0], engine.stream

    def ticking(*asked, **options):
        for event in stream(*asked, **options):
            ticks[0] += 1
            yield event

    monkeypatch.setattr(engine, "stream", ticking)
    monkeypatch.setattr(gpu_engine, "time", SimpleNamespace(perf_counter=lambda: ticks[0]))
    begin, end, *_ = counts._marks(engine, SimpleNamespace(tally=SimpleNamespace(copy=lambda: ticks[0])), answer)
    assert gpu_engine._look_seconds(engine, answer) == end - begin == 3, "the request, the look, the token"


def since(gpu: Pretended, call) -> launches.Tally:
    before = gpu.tally.copy()
    call()
    return gpu.tally - before


class TestPretended:
    def test_kernels_and_views(self):
        with Pretended() as gpu:
            x, weight = gpu.empty((6, 8), torch.bfloat16), gpu.empty((4, 8), torch.bfloat16)
            for call, expected in (
                (lambda: x[1:, None].transpose(0, 1).unflatten(-1, (2, 4)).detach(), []),
                (lambda: torch.empty_like(x), []),
                (lambda: F.linear(x, weight, weight[:, 0]), ["addmm"]),
                (lambda: F.rms_norm(x, (8,)), ["rms_norm"]),
                (lambda: F.silu(x[:, :4]).mul_(x[:, 4:]), ["silu", "mul"]),
                (lambda: F.pad(x, (0, 8)), ["constant_pad_nd"] * 2),
                (
                    lambda: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
                    ["scaled_dot_product_attention"],
                ),
                (lambda: x.contiguous(), []),
                (lambda: x.t().contiguous(), ["clone"]),
                (lambda: x.__setitem__(slice(2), 0.0), ["fill"]),
                (lambda: x.float(), ["copy"]),
            ):
                assert list(since(gpu, call).launches.elements()) == expected

    def test_bytes(self):
        with Pretended() as gpu:
            x, table = gpu.empty((3, 8), torch.float32), gpu.empty((1000, 8), torch.float32)
            rows = gpu.empty((3,), torch.int64)
            assert since(gpu, lambda: x + x).read == 2 * 96
            assert since(gpu, lambda: x[:, :1].expand(3, 8) * 2.0).read == 12
            assert since(gpu, lambda: F.embedding(rows, table)).read == 24
            gpu.watch_cache(table)
            gpu.share = lambda: 0.25
            assert since(gpu, lambda: table + 1.0).read == 8000

    def test_waits_and_copies(self):
        with Pretended() as gpu:
            x = gpu.empty((4,), torch.float32)
            pinned = torch.zeros(4).pin_memory()

            def seen(call) -> tuple[int, int, int, int]:
                tally = since(gpu, call)
                assert not tally.kernels
                return tally.waits.total(), tally.uploads, tally.pageable, tally.downloads

            assert seen(lambda: int(x[0])) == seen(lambda: x[0].item()) == (1, 0, 0, 0)
            assert seen(lambda: x.cpu()) == seen(lambda: x.tolist()) == (1, 0, 0, 1)
            assert seen(lambda: pinned.copy_(x, non_blocking=True)) == (0, 0, 0, 1)
            assert seen(lambda: torch.zeros(4).copy_(x, non_blocking=True)) == (1, 0, 0, 1)
            assert seen(lambda: x.copy_(pinned, non_blocking=True)) == (0, 1, 0, 0)
            assert seen(lambda: x.copy_(pinned)) == (1, 1, 0, 0)
            assert seen(lambda: torch.zeros(4).to(DEVICE)) == (0, 1, 1, 0)
            assert seen(lambda: torch.tensor([1, 2], device=DEVICE)) == (0, 1, 1, 0)
            assert seen(torch.cuda.synchronize) == seen(torch.cuda.current_stream().synchronize) == (1, 0, 0, 0)
            assert seen(torch.cuda.Event().synchronize) == (1, 0, 0, 0)

    def test_a_replay_counts_what_was_captured(self):
        with Pretended() as gpu:
            x, graph = gpu.empty((4,), torch.float32), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x.mul_(2).add_(x)
            assert gpu.tally.kernels == 0
            graph.replay(), graph.replay()
            assert gpu.tally.between == 0
            x.add_(x), graph.replay(), x.add_(x)
            assert gpu.tally.between == 1 and (gpu.tally - Tally(order=gpu.tally.order[:1])).between == 1
            gpu.tally = Tally()
            graph.replay(), graph.replay()
            assert gpu.tally.replays == 2 and gpu.tally.launches == {"mul": 2, "add": 2} and gpu.tally.read == 2 * 48
            with pytest.raises(RuntimeError, match="waited while a graph was captured"), torch.cuda.graph(graph):
                int(x[0])

    def test_triton_kernels_count_where_they_are_launched(self):
        with Pretended() as gpu:
            q, k, v = (gpu.empty((5, heads, 128), torch.bfloat16) for heads in (12, 2, 2))
            caches = [gpu.empty((64, 2, 128), torch.bfloat16) for _ in range(2)]
            table, positions = rotary_table(64, 128).to(DEVICE), torch.zeros(3, 5, dtype=torch.int64).to(DEVICE)
            call = since(gpu, lambda: append_visual_kv(q, k, v, table, positions, positions[0], *caches))
            assert call.launches == {"append_kernel": 1}
            assert call.read == q.nbytes + k.nbytes + v.nbytes + positions.nbytes + positions[0].nbytes


def test_what_it_stands_in_for_is_back_afterwards():
    replaced = [(torch.cuda, "Event"), (torch, "tensor"), (FakeTensor, "tolist"), (JITFunction, "run")]
    before = [getattr(*one) for one in replaced]
    with pytest.raises(KeyError), Pretended():
        assert all(getattr(*one) is not old for one, old in zip(replaced, before))
        raise KeyError
    assert [getattr(*one) for one in replaced] == before
