"""What only the CUDA sources have: launches, both resampling paths, clamped positions.

`test_executed.py` runs this file in a process where backend="cuda" is their build for the CPU.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.launches.kernels import OPERATORS
from tests.cuda import on_cpu
from tests.helpers import (
    CLIP_MEAN,
    CLIP_STD,
    assert_same_bits,
    assert_twice_as_good,
    each_dtype,
    noise,
    normal,
    numbers,
    patchify,
)
from tests.kernels.append_inputs import make
from tests.kernels.control_checks import check
from tests.kernels.control_inputs import composition, fold, parameters
from tests.kernels.roi_checks import check as check_tokens
from vpt_kernels import (
    BackendUnavailable,
    RegionPolicy,
    append_visual_kv,
    append_visual_kv_,
    control_cross_attention,
    fold_patch_weight,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
    sam_policy,
)
from vpt_kernels.roi_patch_embed.geometry import Column


def launches(call) -> tuple[int, int]:
    """How many kernels `call()` launches, and how many of them are chained to the one before."""
    library = on_cpu.load()
    library.vpt_launches(), library.vpt_chained_launches()
    call()
    return library.vpt_launches(), library.vpt_chained_launches()


def test_launches_of_roi_patches():
    image = noise(60, 90, "launches")
    # The tables' launch takes 36 regions, to which the first of those that resample is chained; these take 24.
    for boxes, expected in ((1, 2), (24, 2), (25, 3), (36, 3), (37, 4), (49, 5)):
        plan = plan_regions([(60, 90)], [(0, 0, 0, 20 + i, 30) for i in range(boxes)], qwen2_vl_policy())
        assert launches(lambda plan=plan: roi_patches([image], plan, backend="cuda")) == (expected, 1)


@each_dtype
def test_launches_of_roi_patch_embed(dtype):
    """Two of ours and the library's GEMM, which is not counted here."""
    image = noise(60, 90, "launches")
    embed = fold_patch_weight(normal(8, 3, 14, 14, key="w", dtype=dtype), CLIP_MEAN, CLIP_STD)
    plan = plan_regions([(60, 90)], [(0, 0, 0, 90, 60), (0, 3, 4, 50, 60)], qwen2_vl_policy())
    out = torch.zeros(plan.rows + 3, 8, dtype=dtype)
    assert launches(lambda: roi_patch_embed([image], plan, embed, backend="cuda")) == (2, 1)
    assert launches(lambda: roi_patch_embed_into([image], plan, embed, out, 2, backend="cuda")) == (2, 1)


def test_launches_of_control_and_append():
    projector = fold("identity", 40)
    features, control = normal(2, 5, 40, key="f"), normal(2, 40, key="c")
    assert launches(lambda: control_cross_attention(features, control, projector, backend="cuda")) == (2, 1)
    assert launches(lambda: control_cross_attention(features, None, projector, backend="cuda")) == (1, 0)
    call = make(7)
    assert launches(lambda: call.run("cuda")) == (1, 0)
    assert launches(lambda: call.run_in_place("cuda")) == (1, 0)
    empty = make(0)
    assert launches(lambda: empty.run("cuda")) == (0, 0)


def test_launches_are_what_the_count_declares():
    """`python -m bench launches` counts Triton's kernels; the CUDA backend must not need others."""
    image, plan = noise(60, 90, "launches"), plan_regions([(60, 90)], [(0, 0, 0, 90, 60)], qwen2_vl_policy())
    embed = fold_patch_weight(normal(8, 3, 14, 14, key="w"), CLIP_MEAN, CLIP_STD)
    features, control = normal(2, 5, 40, key="f"), normal(2, 40, key="c")
    calls = {
        "append_visual_kv": lambda: make(7).run("cuda"),
        "control_cross_attention": lambda: control_cross_attention(
            features, control, fold("identity", 40), backend="cuda"
        ),
        "roi_patches": lambda: roi_patches([image], plan, backend="cuda"),
        "roi_patch_embed": lambda: roi_patch_embed([image], plan, embed, backend="cuda"),
    }
    assert set(calls) == set(OPERATORS)
    for name, call in calls.items():
        library_products = 1 if name == "roi_patch_embed" else 0
        assert launches(call)[0] + library_products == OPERATORS[name], name


def test_other_forms_are_declined():
    projector = fold("linear", 40, 24)
    with pytest.raises(BackendUnavailable, match="identity form only"):
        control_cross_attention(normal(4, 24, key="f"), None, projector, backend="cuda")


RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("size, fit", [((6000, 9), (28, 28)), ((9, 6000), (28, 28)), ((2900, 2500), (14, 28))])
@pytest.mark.parametrize("vertical_first", (False, True), ids=("hv", "vh"))
@pytest.mark.parametrize("edge", (None, 4096), ids=("direct", "nearest"))
def test_tiles_too_large_for_shared_memory(resample, size, fit, vertical_first, edge):
    """Where the second pass shrinks a hundredfold, both go through device memory: two launches, each chained."""
    image = noise(*size, "steep")
    policy = RegionPolicy(lambda h, w: fit, 14, 1, resample, regularize_edge=edge)
    plan = plan_regions([size], [(0, 0, 0, size[1], size[0])], policy)
    plan.table[:, Column.VERTICAL_FIRST] = int(vertical_first)
    found: list[torch.Tensor] = []
    count = launches(lambda: found.append(roi_patches([image], plan, backend="cuda")))
    if resample == "bicubic":
        second = 1 if vertical_first else 0
        assert count == ((3, 2) if size[second] > 2000 else (2, 1))
    assert_same_bits(found[0], roi_patches([image], plan, backend="cpp"))
    as_installed = RegionPolicy(lambda h, w: fit, 14, 1, resample, pass_order="installed")
    (row,) = plan_regions([size], [(0, 0, 0, size[1], size[0])], as_installed).table
    if edge is None and vertical_first == bool(row[Column.VERTICAL_FIRST]):
        resized = np.array(Image.fromarray(image.numpy()).resize(fit[::-1], RESAMPLE[resample]))
        assert_same_bits(found[0], patchify(torch.from_numpy(resized), 14, 1))


@pytest.mark.parametrize("vertical_first", (False, True), ids=("hv", "vh"))
@pytest.mark.parametrize("size, fit", (((61, 83), (84, 112)), ((141, 203), (42, 56)), ((300, 290), (28, 28))))
def test_staged_rows_of_any_alignment(size, fit, vertical_first):
    """Rows begin at any address modulo 16; one chunk of lines, several, too few to be staged; or no packed rows."""
    height, width = size
    policy = RegionPolicy(lambda h, w: fit, 14, 1)
    plan = plan_regions([(height, width)], [(0, 3, 2, width - 1, height)], policy)
    plan.table[:, Column.VERTICAL_FIRST] = int(vertical_first)
    image = noise(height, width, "staged")
    want = roi_patches([image], plan, backend="cpp")
    for stride, offset in ((3 * width, 0), (3 * width, 5), (3 * width + 13, 15), ((3 * width + 15) // 16 * 16, 0)):
        storage = torch.full((offset + height * stride,), 255, dtype=torch.uint8)
        view = storage.as_strided((height, width, 3), (stride, 3, 1), offset)
        view.copy_(image)
        assert_same_bits(roi_patches([view], plan, backend="cuda"), want, f"{stride=} {offset=}")
    planes = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_same_bits(roi_patches([planes], plan, backend="cuda"), want)


@pytest.mark.parametrize("vertical_first", (False, True), ids=("hv", "vh"))
def test_window_inside_what_passes_through_device_memory(vertical_first):
    """The second pass begins in the middle of the source, so its lines are counted from the first one that it needs."""
    size, fit = ((12000, 9), (56, 28)) if not vertical_first else ((9, 12000), (28, 56))
    image = noise(*size, "steep window")
    policy = RegionPolicy(lambda h, w: fit, 14, 1, window=(28, 28), anchor="center")
    plan = plan_regions([size], [(0, 0, 0, size[1], size[0])], policy)
    plan.table[:, Column.VERTICAL_FIRST] = int(vertical_first)
    found: list[torch.Tensor] = []
    assert launches(lambda: found.append(roi_patches([image], plan, backend="cuda"))) == (3, 2)
    assert_same_bits(found[0], roi_patches([image], plan, backend="cpp"))


@pytest.mark.parametrize("axis", (0, 1), ids=("tall", "wide"))
@each_dtype
def test_padding_of_both_paths(dtype, axis):
    """SAM pads a slender image, which the tall one brings through device memory; both give the C++ backend's pixels."""
    size = (9000, 12) if axis == 0 else (12, 9000)
    images = [noise(*size, "slender"), noise(*(40, 30)[:: 1 - 2 * axis], "stout")]
    sizes = [tuple(image.shape[:2]) for image in images]
    boxes = [(i, 0, 0, w, h) for i, (h, w) in enumerate(sizes)]
    plan = plan_regions(sizes, boxes, sam_policy(edge=32))
    assert launches(lambda: roi_patches(images, plan, backend="cuda")) == ((4, 2) if axis == 0 else (2, 1))
    assert_same_bits(roi_patches(images, plan, backend="cuda"), roi_patches(images, plan, backend="cpp"))
    weight = normal(9, 3, 16, 16, key="w", dtype=dtype, scale=1 / 28)
    bias = normal(9, key="b", dtype=dtype)
    check_tokens(images, boxes, sam_policy(edge=32), weight, bias, CLIP_MEAN, CLIP_STD, dtype, "cuda", "padding")


def test_more_bias_entries_than_kernel_parameters_hold():
    """A window of each number of valid rows and columns of a patch of 48: 98 entries of the table."""
    size = 48
    images = [noise(8, 8, "entries")]
    plans = []
    for valid in range(1, 48):
        plans += [((48, valid), 0), ((valid, 48), 1)]
    fits = iter([fit for fit, _ in plans])
    policy = RegionPolicy(lambda h, w: next(fits), size, 1, "bilinear", window=(48, 48), anchor="top_left")
    plan = plan_regions([(8, 8)], [(0, 0, 0, 8, 8)] * len(plans), policy)
    embed = fold_patch_weight(normal(5, 3, size, size, key="w", scale=0.01), CLIP_MEAN, CLIP_STD, normal(5, key="b"))
    ours, theirs = (roi_patch_embed(images, plan, embed, backend=name) for name in ("cuda", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_float16_bias_beyond_its_range():
    """An infinite token stays infinite: the bias's further parts do not make it NaN."""
    embed = fold_patch_weight(normal(2, 3, 14, 14, key="w", dtype=torch.float16), CLIP_MEAN, CLIP_STD)
    embed = replace(embed, bias=torch.full_like(embed.bias, 1e6))
    plan = plan_regions([(28, 28)], [(0, 0, 0, 28, 28)], qwen2_vl_policy())
    found = roi_patch_embed([noise(28, 28, "big")], plan, embed, backend="cuda")
    assert torch.isinf(found).all() and (found > 0).all()


@each_dtype
@pytest.mark.parametrize("quantised", (False, True), ids=("plain", "float8"))
@pytest.mark.parametrize(
    "shape", [(19, (4, 2), 16, 16), (5, (3, 1), 24, 16), (3, (2, 2), 14, 10), (33, (28, 4), 128, 128)]
)
@pytest.mark.parametrize("in_place", (False, True), ids=("fresh", "in place"))
def test_append_equals_the_cpu_bit_for_bit(dtype, quantised, shape, in_place):
    tokens, heads, dim, rotary = shape
    call = make(tokens, heads, dim, dtype=dtype, rotary_dim=rotary)
    call.slots[0], call.slots[1], call.slots[2] = -1, 40, 2**40
    if quantised:
        caches = [torch.full(call.k_cache.shape, 0x5A, dtype=torch.uint8).view(torch.float8_e4m3fn) for _ in range(2)]
        scales = [0.01 + normal(heads[1], key=name).abs() / 8 for name in ("ks", "vs")]
        call = replace(call, k_cache=caches[0], v_cache=caches[1], k_scale=scales[0], v_scale=scales[1][:1])
    results = []
    for backend in ("cuda", "cpp"):
        fresh = call.fresh()
        rotated = fresh.q if in_place else None
        if in_place:
            fresh.run_in_place(backend)
        else:
            rotated = fresh.run(backend)
        results.append((rotated, fresh.k_cache, fresh.v_cache))
    for ours, theirs, name in zip(*results, ("q", "k_cache", "v_cache"), strict=True):
        assert_same_bits(ours.view(torch.uint8), theirs.view(torch.uint8), name)


def test_unaligned_views_take_the_narrow_path():
    """Bits do not depend on whether 16 bytes can be read at once."""
    call = make(9, (4, 2), 16, dtype=torch.bfloat16)
    want = call.fresh()
    rotated = want.run("cuda")
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        source = getattr(call, name)
        storage = torch.zeros(source.numel() + 1, dtype=source.dtype)
        shifted = storage[1:].view(source.shape).copy_(source)
        changed = replace(call.fresh(), **{name: shifted})
        assert_same_bits(changed.run("cuda"), rotated, name)
        assert_same_bits(changed.k_cache, want.k_cache, name)
        assert_same_bits(changed.v_cache, want.v_cache, name)


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
def test_positions_are_clamped(index):
    """A GPU cannot raise without a synchronisation: a position outside the table takes its nearest row."""
    call = make(6, table_rows=50)
    wild = torch.tensor([[-1, 50, 2, 2**31 - 1, -(2**31), 49], [0, 1, 99, 3, 4, 5], [7, -7, 8, 9, 77, 49]], dtype=index)
    tame = wild.clamp(0, 49)
    results = []
    for positions in (wild, tame):
        fresh = replace(call.fresh(), positions=positions)
        results.append((fresh.run("cuda"), fresh.k_cache, fresh.v_cache))
    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)


def test_an_empty_table_is_refused():
    call = make(2)
    call = replace(call, cos_sin=call.cos_sin[:0], positions=call.positions * 0)
    for run in (append_visual_kv, append_visual_kv_):
        with pytest.raises(ValueError, match="table is empty"):
            run(*call.tensors(), **call.options(), backend="cuda")


@each_dtype
@pytest.mark.parametrize("hidden", (1, 7, 17, 31, 64, 257))
def test_odd_widths(dtype, hidden):
    check("identity", hidden, (11, hidden), [4, 7], dtype, "cuda", rounds=16)


def test_scores_beyond_float16():
    """f·k = 98,304 does not fit float16, the projected token 2,048 + 98,304/2 does: the score is float32."""
    hidden = 96
    condition = torch.zeros(hidden, hidden), torch.full((hidden,), 0.5)
    given = {"condition_norm": (torch.ones(hidden), torch.zeros(hidden)), "condition": condition}
    projector = fold_projector("identity", **{name: tuple(t.half() for t in pair) for name, pair in given.items()})
    features, control = torch.full((3, hidden), 2048, dtype=torch.float16), torch.zeros(1, hidden, dtype=torch.float16)
    assert (control_cross_attention(features, control, projector, backend="cuda") == 51200).all()


@each_dtype
@pytest.mark.parametrize("mean, spread", ((1000, 1), (0, 0.003)), ids=("far from zero", "near its eps"))
def test_layer_norm_of_the_control(dtype, mean, spread):
    """Around 1000 with a spread of 1 the mean of squares would cancel; a variance of 1e-5 is as large as eps."""
    params = parameters("identity", 96, dtype=dtype)
    features, control = normal(40, 96, key="f", dtype=dtype), (normal(1, 96, key="c") * spread + mean).to(dtype)
    actual = control_cross_attention(features, control, fold_projector("identity", **params), backend="cuda")
    eager, oracle = composition(params, features, control, None, dtype), composition(params, features, control)
    assert_twice_as_good(actual, eager, oracle)


def test_misplaced_segments_stay_in_memory():
    """On a GPU the values of cu_seqlens are not read by the host: nonsense gives nonsense, inside the buffers."""
    projector = fold("identity", 24)
    features, control = normal(11, 24, key="f"), normal(3, 24, key="c")
    rng = numbers("segments")
    op = torch.ops.vpt_kernels.control_cross_attention.cuda
    for _ in range(10):
        ends = torch.from_numpy(rng.integers(-50, 50, 4))
        found = op(features, control, ends, *projector.tensors())
        every = torch.stack(
            [control_cross_attention(features, row[None], projector, backend="cuda") for row in control]
        )
        assert all(any(torch.equal(token, one[i]) for one in every) for i, token in enumerate(found))


def test_every_kernel_is_executed():
    """Each `__global__` of csrc/cuda, by the type of its parameters, in this process; a new one needs a call here."""
    text = "".join(path.read_text() for path in (on_cpu.SOURCES / "cuda").glob("*.cu*"))
    kernels = re.findall(r"(\w+)\(const __grid_constant__ (\w+) p\)", text)
    assert len(kernels) == text.count("__global__") == len({params for _, params in kernels}) > 0
    make(3).run("cuda")
    control_cross_attention(normal(2, 24, key="f"), normal(1, 24, key="c"), fold("identity", 24), backend="cuda")
    image = noise(6000, 9, "steep")
    for fit in ((28, 28), (5600, 28)):
        plan = plan_regions([(6000, 9)], [(0, 0, 0, 9, 6000)], RegionPolicy(lambda h, w, fit=fit: fit, 14, 1))
        roi_patches([image], plan, backend="cuda")
    launched = on_cpu.load().vpt_launched().decode()
    assert [name for name, params in kernels if params not in launched] == []
