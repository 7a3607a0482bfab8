"""What is written shares memory with nothing else: refused alike on every backend, without a false alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits, each_backend, noise, normal, numbers
from tests.kernels.append_checks import each_form, execute
from tests.kernels.append_inputs import Call, make
from tests.kernels.cache_layouts import CACHES, base
from tests.kernels.control_inputs import fold
from vpt_kernels import (
    append_to_flashinfer_pages_,
    append_to_vllm_pages_,
    control_cross_attention_into,
    fold_patch_weight,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed_into,
)
from vpt_kernels.checks import require_disjoint

FP8 = torch.float8_e4m3fn


def good() -> Call:
    return make(4, (4, 2), 16, capacity=8, table_rows=50)


def overlapping(call: Call, name: str, other: str) -> Call:
    """`name` moved to where `other` is: its first elements, or all of them."""
    target, source = getattr(call, other), getattr(call, name)
    if source.numel() * source.itemsize <= target.numel() * target.itemsize:
        view = target.flatten().view(source.dtype)[: source.numel()].view(source.shape)
        return replace(call, **{name: view})
    whole = torch.zeros(source.numel(), dtype=source.dtype).view(source.shape)
    part = whole.flatten()[: target.numel() * target.itemsize // source.itemsize].view(target.dtype)
    return replace(call, **{name: whole, other: part.view(target.shape)})


PAIRS = [(name, cache) for name in ("q", "k", "v") for cache in ("k_cache", "v_cache")]
PAIRS += [("v_cache", "k_cache"), ("cos_sin", "k_cache"), ("positions", "v_cache"), ("slots", "k_cache")]
IN_PLACE = [("k", "q"), ("v", "q"), ("cos_sin", "q"), ("slots", "q"), ("q_norm", "q")]


@each_backend
@pytest.mark.parametrize(
    "names, in_place", [(pair, form) for pair in PAIRS for form in (False, True)] + [(pair, True) for pair in IN_PLACE]
)
def test_a_tensor_inside_another(backend, names, in_place):
    call = replace(good(), q_norm=torch.ones(16)) if "q_norm" in names else good()
    call = overlapping(call, *names)
    kept = [t.clone() for t in call.tensors()]
    with pytest.raises(ValueError, match="share memory") as raised:
        execute(call, backend, in_place)
    assert all(name in str(raised.value) for name in names) and "clone" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    for tensor, before in zip(call.tensors(), kept, strict=True):
        assert_same_bits(tensor, before, "a tensor after an error")


@each_backend
@each_form
@pytest.mark.parametrize("shift", (1, 15, 16, 31, -1))
def test_a_part_is_enough(backend, in_place, shift):
    """k begins `shift` elements before the end of the cache, or ends one behind its beginning."""
    call = good()
    buffer = torch.zeros(3 * 256)
    cache = buffer[256:512].view(8, 2, 16)
    begin = 512 - shift if shift > 0 else 256 - 128 - shift
    k = buffer[begin : begin + 128].view(4, 2, 16)
    with pytest.raises(ValueError, match="k and k_cache share memory"):
        execute(replace(call, k=k, k_cache=cache), backend, in_place)
    beside = buffer[512:640].view(4, 2, 16).copy_(call.k)
    want = call.fresh()
    assert_same_bits(
        execute(replace(call.fresh(), k=beside, k_cache=cache), backend, in_place), execute(want, backend, in_place)
    )


@each_backend
@each_form
def test_a_cache_of_one_row(backend, in_place):
    """Expanded, every slot is the same memory."""
    for name in ("k_cache", "v_cache"):
        call = replace(good(), **{name: torch.zeros(1, 2, 16).expand(8, 2, 16)})
        with pytest.raises(ValueError, match=rf"{name} .*clone"):
            execute(call, backend, in_place)
        call = replace(good(), **{name: torch.zeros(9 * 16).as_strided((8, 2, 16), (16, 16, 1))})
        with pytest.raises(ValueError, match=rf"{name} .*clone"):
            execute(call, backend, in_place)


@each_backend
def test_a_query_of_one_head_in_place(backend):
    call = replace(good(), q=torch.zeros(4, 1, 16).expand(4, 4, 16))
    call.run(backend)
    with pytest.raises(ValueError, match=r"q .*clone"):
        call.run_in_place(backend)


@each_backend
@each_form
@pytest.mark.parametrize("name", CACHES)
def test_caches_of_one_allocation_pass(backend, in_place, name):
    """Pools, pages with keys beside values, layers of one buffer: and they are refused once they are the same rows."""
    _, k_cache, v_cache = CACHES[name](torch.float32)
    execute(replace(base(torch.float32), k_cache=k_cache, v_cache=v_cache), backend, in_place)
    with pytest.raises(ValueError, match="v_cache and k_cache share memory|k_cache and v_cache share memory"):
        execute(replace(base(torch.float32), k_cache=k_cache, v_cache=k_cache), backend, in_place)


@each_backend
@each_form
@pytest.mark.parametrize("order", ((0, 1, 2), (2, 1, 0), (1, 0, 2)))
def test_everything_in_one_allocation_passes(backend, in_place, order):
    """q, k and v of one projection, its rows between those of the caches."""
    call = make(8, (4, 2), 16, capacity=8, table_rows=50)
    sizes = [4, 2, 2]
    rows = torch.zeros(8, 12, 16)
    columns = torch.tensor([0, *np.cumsum([sizes[i] for i in order])])
    views = {"qkv"[i]: rows[:, columns[n] : columns[n + 1]] for n, i in enumerate(order)}
    for name, view in views.items():
        view.copy_(getattr(call, name))
    packed = replace(call, **views, k_cache=rows[:, 8:10], v_cache=rows[:, 10:12])
    want = replace(call.fresh(), k_cache=torch.zeros(8, 2, 16), v_cache=torch.zeros(8, 2, 16))
    assert_same_bits(execute(packed, backend, in_place).contiguous(), execute(want, backend, in_place))
    assert_same_bits(packed.k_cache.contiguous(), want.k_cache)
    assert_same_bits(packed.v_cache.contiguous(), want.v_cache)


def places(x: Tensor) -> list[int]:
    """Offsets of all elements, in elements."""
    found = np.zeros((), dtype=np.int64) + x.storage_offset()
    for size, stride in zip(x.shape, x.stride()):
        found = found[..., None] + np.arange(size) * stride
    return found.flatten().tolist()


def strided(rng: np.random.Generator, memory: Tensor, *shape: int) -> Tensor:
    strides = [int(stride) for stride in rng.integers(0, 24, len(shape) - 1)]
    return memory.as_strided(shape, (*strides, 1), int(rng.integers(0, 140)))


@each_backend
def test_random_strides_are_told_apart_exactly(backend):
    """Against sets of addresses: what has an element in common is refused, all else runs."""
    rng, refused = numbers("overlap"), 0
    for _ in range(400):
        memory = torch.zeros(400)
        call = replace(
            good(), q=torch.ones(3, 2, 2), positions=torch.zeros(3, 3, dtype=torch.int64), slots=torch.arange(3)
        )
        call = replace(call, cos_sin=torch.ones(4, 2), sections=(1, 0, 0))
        k, v = strided(rng, memory, 3, 2, 2), torch.ones(3, 2, 2)
        k_cache = strided(rng, memory, 3, 2, 2)
        v_cache = strided(rng, memory, 3, 2, 2) if rng.random() < 0.3 else torch.zeros(3, 2, 2)
        sets = [set(places(t)) for t in (k, k_cache)] + ([set(places(v_cache))] if v_cache.storage_offset() else [])
        own = all(len(places(t)) == len(set(places(t))) for t in (k_cache, v_cache))
        apart = own and not any(a & b for i, a in enumerate(sets) for b in sets[:i])
        if v_cache.data_ptr() == memory.data_ptr():
            continue
        call = replace(call, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
        if apart:
            call.run(backend)
        else:
            refused += 1
            with pytest.raises(ValueError, match="share memory|one and the same"):
                call.run(backend)
    assert 40 < refused < 390


def control(features: Tensor, out: Tensor, rows: Tensor, backend: str, states: Tensor | None = None) -> None:
    states = normal(1, 24, key="c") if states is None else states
    control_cross_attention_into(features, states, fold("identity", 24), out, rows, backend=backend)


ROWS = normal(12, 24, key="rows in turn")


def buffers() -> dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    def split(first: slice, second: slice) -> tuple[Tensor, Tensor, Tensor]:
        whole = normal(12, 48, key="whole")
        return whole[first, :24], whole[second, 24:], torch.arange(5)

    return {
        "columns beside columns": lambda: split(slice(0, 5), slice(0, 12)),
        "rows in turn": lambda: (ROWS[0:10:2], ROWS[1::2], torch.arange(5)),
    }


@each_backend
@pytest.mark.parametrize("name", buffers())
def test_control_beside_its_features_passes(backend, name):
    features, out, rows = buffers()[name]()
    kept = features.clone()
    control(features, out, rows, backend)
    assert_same_bits(features.contiguous(), kept.contiguous())


@each_backend
def test_control_over_its_inputs_is_refused(backend):
    whole = normal(12, 24, key="whole")
    rows = torch.arange(5)
    for features, out in ((whole[:5], whole), (whole[2:7], whole[6:]), (whole[::2][:5], whole[1:][::3])):
        kept = whole.clone()
        with pytest.raises(ValueError, match="features and out share memory"):
            control(features, out, rows, backend)
        assert_same_bits(whole, kept)
    with pytest.raises(ValueError, match="control and out share memory"):
        control(normal(5, 24, key="f"), whole, rows, backend, whole[3:4])
    with pytest.raises(ValueError, match="rows and out share memory"):
        control(normal(5, 24, key="f"), whole, whole.view(torch.int64)[0, :5], backend)
    with pytest.raises(ValueError, match=r"out .*clone"):
        control(normal(5, 24, key="f"), torch.zeros(1, 24).expand(8, 24), rows, backend)


@each_backend
def test_control_over_the_projector_is_refused(backend):
    made = fold("identity", 24)
    features, rows = normal(5, 24, key="f"), torch.arange(5)
    for name, weight in vars(made).items():
        if weight is None:
            continue
        whole = torch.zeros(48, 24, dtype=weight.dtype)
        inside = whole.flatten()[-weight.numel() :].view(weight.shape).copy_(weight)
        kept = whole.clone()
        with pytest.raises(ValueError, match=f"{name} and out share memory"):
            control_cross_attention_into(
                features, normal(1, 24, key="c"), replace(made, **{name: inside}), whole, rows, backend=backend
            )
        assert_same_bits(whole, kept)


@each_backend
def test_tokens_over_the_weight_or_the_picture_are_refused(backend):
    image = noise(56, 56, "picture")
    plan = plan_regions([(56, 56)], [(0, 0, 0, 56, 56)], qwen2_vl_policy(min_pixels=56 * 56, max_pixels=56 * 56))
    embed = fold_patch_weight(normal(8, 3, 14, 14, key="w"), (0.5,) * 3, (0.5,) * 3)
    memory = torch.zeros(56 * 56 * 3, dtype=torch.uint8)
    inside = memory.view(56, 56, 3).copy_(image)
    out = memory[: plan.rows * 8 * 4].view(torch.float32).view(plan.rows, 8)
    with pytest.raises(ValueError, match="image 0 and out share memory"):
        roi_patch_embed_into([inside], plan, embed, out, backend=backend)
    assert_same_bits(inside, image)
    wide = torch.zeros(plan.rows + 8 * 588 // 8, 8)
    shared = replace(embed, weight=wide.flatten()[-8 * 588 :].view(8, 588).copy_(embed.weight))
    with pytest.raises(ValueError, match="weight and out share memory"):
        roi_patch_embed_into([image], plan, shared, wide, row=1, backend=backend)
    want = torch.zeros(plan.rows, 8)
    roi_patch_embed_into([image], plan, embed, want, backend=backend)
    roi_patch_embed_into([image], plan, shared, wide, backend=backend)
    assert_same_bits(wide[: plan.rows], want)


def negated(*shape: int) -> Tensor:
    """As the imaginary part of a conjugate is: a view that stands for the negative of its memory."""
    return torch._neg_view(torch.zeros(shape))


@each_backend
def test_what_is_written_is_no_negated_view(backend):
    image = noise(56, 56, "picture")
    plan = plan_regions([(56, 56)], [(0, 0, 0, 56, 56)], qwen2_vl_policy(min_pixels=56 * 56, max_pixels=56 * 56))
    embed = fold_patch_weight(normal(8, 3, 14, 14, key="w"), (0.5,) * 3, (0.5,) * 3)
    refused: dict[str, Callable[[Tensor], object]] = {
        "k_cache": lambda out: replace(good(), k_cache=out.view(8, 2, 16)).run(backend),
        "v_cache": lambda out: replace(good(), v_cache=out.view(8, 2, 16)).run_in_place(backend),
        "q": lambda out: replace(good(), q=out.view(4, 4, 16)).run_in_place(backend),
        "out": lambda out: roi_patch_embed_into([image], plan, embed, out[:128].view(16, 8), backend=backend),
        "out ": lambda out: control(normal(5, 24, key="f"), out[:240].view(10, 24), torch.arange(5), backend),
    }
    for name, call in refused.items():
        out = negated(256)
        with pytest.raises(ValueError, match=rf"^{name.strip()} is a negated view.*clone"):
            call(out)
        assert not out.any()


@each_backend
def test_negated_views_are_read_as_what_they_stand_for(backend):
    call, want = good(), good()
    call = replace(call, k=torch._neg_view(-call.k), q=torch._neg_view(-call.q))
    assert_same_bits(call.run(backend), want.run(backend))
    assert_same_bits(call.k_cache, want.k_cache)


def quantised() -> Call:
    caches = {name: torch.zeros(8, 2, 16).to(FP8) for name in ("k_cache", "v_cache")}
    return replace(good(), k_scale=torch.tensor([0.3, 0.7]), v_scale=torch.tensor(0.5), **caches)


@each_backend
@each_form
@pytest.mark.parametrize("which", (("k_cache", "v_cache"), ("k_cache",), ("v_cache",)))
def test_bytes_are_the_float8_that_they_hold(backend, in_place, which):
    call, want = quantised(), quantised()
    call = replace(call, **{name: getattr(call, name).view(torch.uint8) for name in which})
    assert_same_bits(execute(call, backend, in_place), execute(want, backend, in_place))
    for name in ("k_cache", "v_cache"):
        assert_same_bits(getattr(call, name).view(torch.uint8), getattr(want, name).view(torch.uint8), name)
    assert call.k_cache.view(torch.uint8).any()


@each_backend
@each_form
def test_bytes_without_scales_are_refused(backend, in_place):
    call = replace(quantised(), k_cache=torch.zeros(8, 2, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"k_cache is torch.uint8.*float8_e4m3fn.*k_scale"):
        execute(replace(call, k_scale=None, v_scale=None), backend, in_place)
    call = replace(good(), v_cache=torch.zeros(8, 2, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"v_cache is torch.uint8"):
        execute(call, backend, in_place)


@each_backend
@pytest.mark.parametrize("kind", (FP8, torch.uint8), ids=("float8", "bytes"))
def test_float8_pages_of_other_stacks(backend, kind):
    """vLLM's [2, blocks, …] and FlashInfer's [pages, 2, …], which interleaves keys and values, in either dtype."""
    want = quantised()
    want.run(backend)
    call, scales = quantised(), {"k_scale": want.k_scale, "v_scale": want.v_scale}
    q, k, v, table, positions, slots = call.fresh().tensors()[:6]
    pages = torch.zeros(2, 4, 2, 2, 16).to(FP8).view(kind)
    append_to_vllm_pages_(q, k, v, table, positions, pages, slots, call.sections, **scales, backend=backend)
    for page, cache in zip(pages, (want.k_cache, want.v_cache), strict=True):
        assert_same_bits(page.reshape(8, 2, 16).view(torch.uint8), cache.view(torch.uint8), "vLLM")
    q, k, v, table, positions = quantised().fresh().tensors()[:5]
    pool = torch.zeros(4, 2, 2, 2, 16).to(FP8).view(kind)
    plan = [torch.tensor(numbers_, dtype=torch.int32) for numbers_ in ([0, 4], [3, 1], [0, 2], [2])]
    append_to_flashinfer_pages_(q, k, v, table, positions, pool, *plan, call.sections, **scales, backend=backend)
    order = replace(quantised(), slots=torch.tensor([6, 7, 2, 3]))
    order.run(backend)
    for half, cache in zip(pool.unbind(1), (order.k_cache, order.v_cache), strict=True):
        assert_same_bits(half.reshape(8, 2, 16).view(torch.uint8), cache.view(torch.uint8), "FlashInfer")


def test_traced_and_fake_tensors_have_no_addresses():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.zeros(4)
        require_disjoint({"x": x}, {"y": x})
