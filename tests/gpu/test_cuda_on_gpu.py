"""The CUDA backend on a GPU: bits, graphs, streams. The same kernels run on the CPU in `tests/cuda`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from tests.helpers import CLIP_MEAN, CLIP_STD, assert_same_bits, assert_twice_as_good, each_dtype, noise, normal
from tests.kernels.append_inputs import Call, make
from tests.kernels.control_inputs import composition, fold, parameters
from vpt_kernels import (
    FoldedPatchEmbed,
    RegionPlan,
    RegionPolicy,
    control_cross_attention,
    control_cross_attention_into,
    dinov2_policy,
    fold_patch_weight,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
    sam_policy,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def on_gpu(call: Call) -> Call:
    moved = {f.name: getattr(call, f.name) for f in fields(call)}
    return replace(call, **{name: t.cuda() for name, t in moved.items() if isinstance(t, Tensor)})


POLICIES = {"qwen2_vl": qwen2_vl_policy(longest_edge=256), "dinov2": dinov2_policy(), "sam": sam_policy(edge=256)}


def regions(policy: RegionPolicy) -> tuple[list[Tensor], RegionPlan]:
    images = [noise(333, 517, "gpu"), noise(90, 600, "gpu"), noise(40, 40, "gpu")]
    sizes = [tuple(image.shape[:2]) for image in images]
    boxes = [(i, 0, 0, w, h) for i, (h, w) in enumerate(sizes)] + [(0, 100 + i, 20, 401 + i, 300) for i in range(30)]
    return images, plan_regions(sizes, boxes, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_equal_the_cpu(policy: str) -> None:
    images, plan = regions(POLICIES[policy])
    moved = [image.cuda() for image in images]
    found = roi_patches(moved, plan, backend="cuda")
    assert_same_bits(found.cpu(), roi_patches(images, plan, backend="reference"))
    strided = [image.permute(2, 0, 1).contiguous().permute(1, 2, 0) for image in moved]
    assert_same_bits(roi_patches(strided, plan, backend="cuda"), found)


@pytest.mark.parametrize("size", ((6000, 9), (9, 6000), (2900, 2500)))
def test_pixels_through_device_memory(size: tuple[int, int]) -> None:
    image = noise(*size, "steep")
    plan = plan_regions([size], [(0, 0, 0, size[1], size[0])], RegionPolicy(lambda h, w: (28, 14), 14, 1))
    found = roi_patches([image.cuda()], plan, backend="cuda")
    assert_same_bits(found.cpu(), roi_patches([image], plan, backend="reference"))


def embedding(dtype: torch.dtype, patch: int) -> tuple[FoldedPatchEmbed, FoldedPatchEmbed]:
    weight = normal(64, 3, patch, patch, key="w", dtype=dtype, scale=1 / (patch * 1.7))
    embed = fold_patch_weight(weight, CLIP_MEAN, CLIP_STD, normal(64, key="b", dtype=dtype))
    return embed, replace(embed, weight=embed.weight.cuda(), bias=embed.bias.cuda())


@each_dtype
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens(dtype: torch.dtype, policy: str) -> None:
    images, plan = regions(POLICIES[policy])
    moved = [image.cuda() for image in images]
    embed, on_device = embedding(dtype, plan.patch_size)
    wide = replace(embed, weight=embed.weight.double(), bias=embed.bias.double())
    oracle = roi_patch_embed(images, plan, wide, backend="reference")
    eager = roi_patch_embed(images, plan, embed, backend="reference")
    found = roi_patch_embed(moved, plan, on_device, backend="cuda")
    assert_twice_as_good(found.cpu(), eager, oracle)
    out = torch.full((plan.rows + 5, 64), float("nan"), dtype=dtype, device="cuda")
    roi_patch_embed_into(moved, plan, on_device, out, 3, backend="cuda")
    assert_same_bits(out[3:-2], found)
    assert out[:3].isnan().all() and out[-2:].isnan().all()


@each_dtype
@pytest.mark.parametrize("conditioned", (False, True))
def test_identity_projection(dtype: torch.dtype, conditioned: bool) -> None:
    hidden = 1536
    features = normal(300, hidden, key="f", dtype=dtype)
    control = normal(3, hidden, key="c", dtype=dtype) if conditioned else None
    ends = [0, 100, 101, 300]
    params = parameters("identity", hidden, dtype=dtype)
    oracle = composition(params, features, control, ends)
    eager = composition(params, features, control, ends, dtype)
    moved = {name: tuple(t.cuda() for t in pair) for name, pair in params.items()}
    projector = fold_projector("identity", **moved)
    cu = torch.tensor(ends, device="cuda")
    arguments = (features.cuda(), None if control is None else control.cuda(), projector)
    found = control_cross_attention(*arguments, cu, backend="cuda")
    assert_twice_as_good(found.cpu(), eager, oracle)
    rows = torch.randperm(310, device="cuda")[:300]
    rows[7] = -1
    out = torch.full((305, hidden), float("nan"), dtype=dtype, device="cuda")
    control_cross_attention_into(*arguments, out, rows, cu, backend="cuda")
    for token, row in enumerate(rows.tolist()):
        if 0 <= row < 305:
            assert torch.equal(out[row], found[token])
    assert int(out.isnan().all(1).sum()) == 305 - int(((rows >= 0) & (rows < 305)).sum())


@each_dtype
@pytest.mark.parametrize("quantised", (False, True), ids=("plain", "float8"))
@pytest.mark.parametrize("shape", ((1, (12, 2), 128, 128), (270, (28, 4), 128, 128), (19, (3, 1), 14, 10)))
def test_append_equals_the_cpu(dtype: torch.dtype, quantised: bool, shape: tuple) -> None:
    tokens, heads, dim, rotary = shape
    call = make(tokens, heads, dim, dtype=dtype, rotary_dim=rotary, capacity=400)
    call.slots[::7] = -1
    if quantised:
        caches = [torch.full(call.k_cache.shape, 0x5A, dtype=torch.uint8).view(torch.float8_e4m3fn) for _ in range(2)]
        scale = 0.01 + normal(heads[1], key="scale").abs() / 8
        call = replace(call, k_cache=caches[0], v_cache=caches[1], k_scale=scale, v_scale=scale[:1])
    moved = on_gpu(call)
    want = call.run("cpp")
    assert_same_bits(moved.run("cuda").cpu(), want, "q")
    for name in ("k_cache", "v_cache"):
        assert_same_bits(getattr(moved, name).cpu().view(torch.uint8), getattr(call, name).view(torch.uint8), name)


def captured(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def test_graph_with_new_slots_and_positions() -> None:
    call = on_gpu(make(64, (12, 2), 128, dtype=torch.bfloat16, capacity=300))
    kept: list[Tensor] = []

    def step() -> None:
        kept[:] = [call.run("cuda")]

    graph = captured(step)
    for seed in range(3):
        torch.manual_seed(seed)
        call.slots.copy_(torch.randperm(320, device="cuda")[:64] - 5)
        call.positions.copy_(torch.randint(0, 4096, (3, 64), device="cuda"))
        call.q.normal_()
        call.k_cache.zero_(), call.v_cache.zero_()
        graph.replay()
        fresh = replace(call, k_cache=torch.zeros_like(call.k_cache), v_cache=torch.zeros_like(call.v_cache))
        assert_same_bits(kept[0], fresh.run("cuda"))
        assert_same_bits(call.k_cache, fresh.k_cache)
        assert_same_bits(call.v_cache, fresh.v_cache)


def test_graph_with_new_pixels_and_control() -> None:
    images, plan = regions(POLICIES["qwen2_vl"])
    moved = [image.cuda() for image in images]
    _, embed = embedding(torch.bfloat16, 14)
    projector = fold("identity", 64, dtype=torch.bfloat16)
    projector = replace(
        projector,
        **{
            f.name: getattr(projector, f.name).cuda()
            for f in fields(projector)
            if getattr(projector, f.name) is not None
        },
    )
    control = torch.zeros(1, 64, dtype=torch.bfloat16, device="cuda")
    out = torch.zeros(plan.rows, 64, dtype=torch.bfloat16, device="cuda")
    tokens = torch.zeros_like(out)
    rows = torch.arange(plan.rows, device="cuda")

    def step() -> None:
        roi_patch_embed_into(moved, plan, embed, tokens, backend="cuda")
        control_cross_attention_into(tokens, control, projector, out, rows, backend="cuda")

    graph = captured(step)
    for seed in range(3):
        torch.manual_seed(seed)
        for image in moved:
            image.random_(0, 256)
        control.normal_()
        graph.replay()
        expected = roi_patch_embed(moved, plan, embed, backend="cuda")
        assert_same_bits(tokens, expected)
        assert_same_bits(out, control_cross_attention(expected, control, projector, backend="cuda"))


def test_side_stream_and_repetition() -> None:
    """Work goes to the current stream: it sees what the stream did before. Runs repeat bit for bit."""
    images, plan = regions(POLICIES["sam"])
    moved = [torch.zeros_like(image, device="cuda") for image in images]
    _, embed = embedding(torch.bfloat16, 16)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, image in zip(moved, images, strict=True):
            target.copy_(image.cuda(), non_blocking=True)
        first = roi_patch_embed(moved, plan, embed, backend="cuda")
        second = roi_patch_embed(moved, plan, embed, backend="cuda")
    stream.synchronize()
    assert_same_bits(first, second)
    assert_same_bits(first, roi_patch_embed([image.cuda() for image in images], plan, embed, backend="cuda"))


def test_offsets_beyond_32_bits() -> None:
    """A cache whose rows are 300 MB apart, where the memory for it is there."""
    rows, dim, distance = 16, 128, 300 << 20
    if torch.cuda.mem_get_info()[0] < 2 * rows * distance + (1 << 30):
        pytest.skip("less than 11 GB of GPU memory are free")
    call = on_gpu(make(8, (2, 1), dim, dtype=torch.bfloat16, capacity=rows))
    storages = [torch.zeros(rows * distance // 2, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    k_cache, v_cache = (s.as_strided((rows, 1, dim), (distance // 2, dim, 1)) for s in storages)
    k_cache.copy_(call.k_cache), v_cache.copy_(call.v_cache)
    far = replace(call, k_cache=k_cache, v_cache=v_cache)
    assert_same_bits(far.run("cuda"), call.run("cuda"))
    assert_same_bits(far.k_cache.contiguous(), call.k_cache)
    assert_same_bits(far.v_cache.contiguous(), call.v_cache)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    """The device of the tensors counts, not the current one."""
    call = make(9, (4, 2), 16)
    moved = {f.name: getattr(call, f.name) for f in fields(call)}
    other = replace(call, **{n: t.to("cuda:1") for n, t in moved.items() if isinstance(t, Tensor)})
    with torch.cuda.device(0):
        assert_same_bits(other.run("cuda").cpu(), call.run("cpp"))
        assert torch.cuda.current_device() == 0
