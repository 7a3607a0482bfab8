"""Triton's kernels on a GPU: the oracle of the CPU tests, graphs, streams, repeated runs."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits, assert_twice_as_good, each_dtype, normal
from tests.kernels.append_inputs import Call, make
from tests.kernels.control_inputs import composition, parameters
from vpt_kernels import ControlProjector, control_cross_attention, control_cross_attention_into, fold_projector

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def to_gpu(call: Call) -> Call:
    moved = {f.name: getattr(call, f.name).cuda() for f in fields(call) if isinstance(getattr(call, f.name), Tensor)}
    return replace(call, **moved)


def append_call(kind: str, dtype: torch.dtype, tokens: int) -> Call:
    shape = {"heads": (12, 2), "head_dim": 128, "sections": (16, 24, 24), "capacity": tokens + 24}
    call = make(tokens, dtype=dtype, **shape)
    call.slots[::7] = -1
    call.slots[1::9] = tokens + 24
    if kind == "paged heads":
        caches = {n: torch.zeros((tokens + 24) // 8 + 1, 2, 8, 128, dtype=dtype) for n in ("k_cache", "v_cache")}
        return replace(call, layout="HND", interleaved=True, sections=(24, 20, 20), **caches)
    if kind == "float8":
        caches = {n: torch.zeros(tokens + 24, 2, 128).to(FP8) for n in ("k_cache", "v_cache")}
        return replace(call, **caches, k_scale=torch.tensor([0.03, 0.7]), v_scale=torch.tensor(0.01))
    return call


@each_dtype
@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("tokens", (1, 17, 270, 4099))
@pytest.mark.parametrize("kind", ("plain", "paged heads", "float8"))
def test_append_gives_the_bits_of_the_cpu(dtype, in_place, tokens, kind):
    """Every operation is rounded on its own in both, also those of a float8 cache; sm_80 included."""
    call = append_call(kind, dtype, tokens)
    moved = to_gpu(call)
    want = call.run("cpp")
    if in_place:
        moved.run_in_place("triton")
    found = moved.q if in_place else moved.run("triton")
    assert_same_bits(found.cpu(), want)
    for name in ("k_cache", "v_cache"):
        ours, theirs = getattr(moved, name).cpu(), getattr(call, name)
        assert_same_bits(ours.view(torch.uint8), theirs.view(torch.uint8), name)


@each_dtype
def test_append_to_caches_beyond_32_bits(dtype):
    """The last slots of a cache of 5 × 2^30 elements; room for its addresses only where memory is scarce."""
    rows = 5 * (1 << 30) // 256
    if torch.cuda.mem_get_info()[0] < 3 * rows * 256 * dtype.itemsize:
        rows = (1 << 31) // 256 + 64
    call = make(9, (4, 2), 128, dtype=dtype, sections=(16, 24, 24), capacity=32)
    moved = to_gpu(call)
    caches = [torch.zeros(rows, 2, 128, dtype=dtype, device="cuda") for _ in range(2)]
    far = replace(moved, slots=moved.slots + (rows - 32), k_cache=caches[0], v_cache=caches[1])
    far.run("triton")
    call.run("cpp")
    for cache, want in zip(caches, (call.k_cache, call.v_cache), strict=True):
        assert_same_bits(cache[rows - 32 :][call.slots.cuda()].cpu(), want[call.slots])
        assert not cache[: rows - 32].any()


def project(form: str, dtype: torch.dtype) -> tuple[dict, Tensor, Tensor, list[int] | None, ControlProjector]:
    width = {"linear": 1024, "conv": 256, "identity": 1536}[form]
    params = parameters(form, 1536, width, dtype)
    shape, cu = (256 + 37, width), [0, 37, 37, 256 + 37]
    if form == "conv":
        shape, cu = (2, width, 32, 16), None
    features = normal(*shape, key=form, dtype=dtype)
    control = normal(3 if cu else 2, 1536, key="c", dtype=dtype, scale=3)
    projector = fold_projector(form, **{name: tuple(t.cuda() for t in pair) for name, pair in params.items()})
    return params, features, control, cu, projector


@each_dtype
@pytest.mark.parametrize("conditioned", (True, False))
@pytest.mark.parametrize("form", ("linear", "conv", "identity"))
def test_projection(form, dtype, conditioned):
    params, features, control, cu, projector = project(form, dtype)
    control = control if conditioned else None
    given = None if cu is None else torch.tensor(cu, device="cuda")
    state = control.cuda() if conditioned else None
    found = control_cross_attention(features.cuda(), state, projector, given, backend="triton")
    again = control_cross_attention(features.cuda(), state, projector, given, backend="triton")
    assert_same_bits(again, found, "second run")
    eager, exact = (composition(params, features, control, cu, kind) for kind in (dtype, torch.float64))
    assert_twice_as_good(found.cpu(), eager, exact)


@each_dtype
@pytest.mark.parametrize("form", ("linear", "conv", "identity"))
def test_nan_stays_in_its_image(form, dtype):
    _, features, control, cu, projector = project(form, dtype)
    ends = cu or [0, 32, 64]
    given = None if cu is None else torch.tensor(cu, device="cuda")
    clean = control_cross_attention(features.cuda(), control.cuda(), projector, given, backend="triton")
    control[0, 5] = float("nan")
    found = control_cross_attention(features.cuda(), control.cuda(), projector, given, backend="triton")
    assert found[: ends[1]].isnan().all()
    assert_same_bits(found[ends[1] :], clean[ends[1] :])


def captured(step) -> torch.cuda.CUDAGraph:
    """A graph of `step`, which has run before on a stream of its own: compiled, and allocated outside the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@each_dtype
@pytest.mark.parametrize("kind", ("plain", "float8"))
def test_append_in_a_graph(dtype, kind):
    """New tokens, slots and positions between replays."""
    base = to_gpu(append_call(kind, dtype, 33))
    rotated = torch.empty_like(base.q)
    graph = captured(lambda: rotated.copy_(base.run("triton")))
    for shift in (0, 1, 5):
        base.slots.copy_(torch.roll(base.slots, shift))
        base.positions.copy_(torch.roll(base.positions, shift, 1))
        base.q.copy_(torch.roll(base.q, shift, 0))
        for cache in (base.k_cache, base.v_cache):
            cache.view(torch.uint8).zero_()
        eager = replace(base, k_cache=base.k_cache.clone(), v_cache=base.v_cache.clone())
        want = eager.run("triton")
        graph.replay()
        assert_same_bits(rotated, want)
        assert_same_bits(base.k_cache.view(torch.uint8), eager.k_cache.view(torch.uint8))
        assert_same_bits(base.v_cache.view(torch.uint8), eager.v_cache.view(torch.uint8))


@each_dtype
@pytest.mark.parametrize("form", ("linear", "conv", "identity"))
def test_projection_in_a_graph(form, dtype):
    """Both launches, chained; features, control, rows and the images' ends change between replays."""
    _, features, control, cu, projector = project(form, dtype)
    features, control = features.cuda(), control.cuda()
    ends = None if cu is None else torch.tensor(cu, device="cuda")
    tokens = features.shape[0] if cu else 64
    rows = torch.arange(tokens, device="cuda")
    out = torch.zeros(tokens + 5, 1536, dtype=dtype, device="cuda")
    graph = captured(
        lambda: control_cross_attention_into(features, control, projector, out, rows, ends, backend="triton")
    )
    for step in range(3):
        features.mul_(0.5)
        control.copy_(torch.roll(control, 1, 0))
        rows.copy_(torch.roll(rows, step + 1))
        rows[step] = -1
        if cu:
            ends[1] += 3
        want = torch.zeros_like(out)
        control_cross_attention_into(features, control, projector, want, rows, ends, backend="triton")
        out.zero_()
        graph.replay()
        assert_same_bits(out, want)


@pytest.mark.parametrize("form", ("linear", "identity"))
def test_on_a_side_stream(form):
    """The current stream's order is kept: inputs that are made there are read after they are made."""
    _, features, control, cu, projector = project(form, torch.bfloat16)
    features, control, ends = features.cuda(), control.cuda(), torch.tensor(cu, device="cuda")
    want = control_cross_attention(features * 2, control, projector, ends, backend="triton")
    call = to_gpu(append_call("plain", torch.bfloat16, 270))
    expected = replace(call, k_cache=call.k_cache.clone(), v_cache=call.v_cache.clone())
    rotated = expected.run("triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        found = control_cross_attention(features * 2, control, projector, ends, backend="triton")
        turned = call.run("triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, want)
    assert_same_bits(turned, rotated)
    assert_same_bits(call.k_cache, expected.k_cache)


def test_one_compilation_serves_every_token_count():
    """Neither kernel is compiled again for another number of tokens, images or slots."""
    from vpt_kernels.append_visual_kv.triton import append_kernel
    from vpt_kernels.control_cross_attention.triton import project_kernel

    def compiled(kernel) -> int:
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    _, features, control, _, projector = project("linear", torch.bfloat16)
    counts = []
    for tokens in (16, 17, 1, 63, 48, 2):
        to_gpu(append_call("plain", torch.bfloat16, 60)).run("triton")
        call = to_gpu(make(tokens, (12, 2), 128, dtype=torch.bfloat16, sections=(16, 24, 24), capacity=64))
        call.run("triton")
        control_cross_attention(features[:tokens].cuda(), control[:1].cuda(), projector, backend="triton")
        counts.append((compiled(append_kernel), compiled(project_kernel)))
    assert len(set(counts)) == 1, counts
