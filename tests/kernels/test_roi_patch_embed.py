"""Tokens of `roi_patch_embed` against a float64 oracle, and where they are written."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    assert_same_bits,
    each_backend,
    each_dtype,
    each_model_dtype,
    noise,
    normal,
    photo,
    virtual_bytes,
)
from tests.kernels.roi_checks import check, weights
from vpt_kernels import (
    FoldedPatchEmbed,
    RegionPlan,
    RegionPolicy,
    dinov2_policy,
    fold_patch_weight,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    sam_policy,
)

CONTENTS = {
    "grey 128": lambda h, w: torch.full((h, w, 3), 128, dtype=torch.uint8),
    "grey 119": lambda h, w: torch.full((h, w, 3), 119, dtype=torch.uint8),
    "white": lambda h, w: torch.full((h, w, 3), 255, dtype=torch.uint8),
    "black": lambda h, w: torch.zeros((h, w, 3), dtype=torch.uint8),
    "red": lambda h, w: torch.tensor([255, 0, 0], dtype=torch.uint8).repeat(h, w, 1),
    "astronaut": lambda h, w: photo("astronaut")[:h, :w].contiguous(),
    "retina": lambda h, w: photo("retina", 470)[:h, :w].contiguous(),
    "noise": lambda h, w: noise(h, w, "embed"),
}


@each_backend
@each_dtype
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("coherent", (False, True), ids=("random", "coherent"))
def test_qwen2_vl_tokens(backend, dtype, content, coherent):
    """Both frames of a temporal patch are the same picture, so the two weight slices act as their sum.

    As many outputs as the models have, not quite: patches of a flat picture are alike, and some tens of their outputs
    are judged by chance, for with few of them the libraries' order of summation depends on the threads.
    """
    image = CONTENTS[content](200, 260)
    weight = weights((1278, 3, 2, 14, 14), dtype, coherent)
    check(
        [image], [(0, 10, 5, 240, 180)], qwen2_vl_policy(), weight, None, CLIP_MEAN, CLIP_STD, dtype, backend, content
    )


@each_backend
@pytest.mark.parametrize("content", ("white", "astronaut"))
def test_small_weights_in_float16(backend, content):
    """Divided by 255 they would lose bits to float16's denormals: the fold carries a power of two."""
    image, weight = CONTENTS[content](200, 260), weights((70, 3, 2, 14, 14), torch.float16) / 32
    policy, box = qwen2_vl_policy(), [(0, 10, 5, 240, 180)]
    check([image], box, policy, weight, None, CLIP_MEAN, CLIP_STD, torch.float16, backend, content)


@each_backend
@each_dtype
@pytest.mark.parametrize("content", CONTENTS)
def test_dinov2_tokens(backend, dtype, content):
    weight, bias = weights((96, 3, 14, 14), dtype), normal(96, key="bias", dtype=dtype)
    image = CONTENTS[content](100, 140)
    check(
        [image],
        [(0, 0, 0, 140, 100)],
        dinov2_policy(),
        weight,
        bias,
        IMAGENET_MEAN,
        IMAGENET_STD,
        dtype,
        backend,
        content,
    )


@each_backend
@each_dtype
@pytest.mark.parametrize("content", ("grey 128", "white", "black", "astronaut"))
@pytest.mark.parametrize("size", ((100, 61), (61, 100), (100, 1), (1, 100), (100, 100), (99, 96)))
def test_sam_tokens_with_padding(backend, dtype, content, size):
    """The padded side ends inside a patch, for nearly every size."""
    weight, bias = weights((96, 3, 16, 16), dtype), normal(96, key="bias", dtype=dtype)
    image = CONTENTS[content](*size)
    boxes = [(0, 0, 0, size[1], size[0])]
    for edge in (128, 112):
        check([image], boxes, sam_policy(edge=edge), weight, bias, IMAGENET_MEAN, IMAGENET_STD, dtype, backend, content)


@each_backend
@each_model_dtype
def test_sam_tokens_at_full_size(backend, dtype):
    weight, bias = weights((48, 3, 16, 16), dtype), normal(48, key="bias", dtype=dtype)
    image = photo("astronaut")[:333]
    assert sam_policy().fit(*image.shape[:2])[0] % 16 not in (0, 15)
    boxes = [(0, 0, 0, image.shape[1], 333)]
    check([image], boxes, sam_policy(), weight, bias, IMAGENET_MEAN, IMAGENET_STD, dtype, backend, "astronaut")


@each_backend
@each_dtype
@pytest.mark.parametrize("valid", range(17))
def test_every_number_of_valid_rows_and_columns(backend, dtype, valid):
    """A 32×32 window whose second row, then column, of patches holds `valid` rows, or columns, of image."""
    weight, bias = weights((40, 3, 16, 16), dtype, coherent=True), normal(40, key="bias", dtype=dtype)
    image = noise(16 + valid, 32, "valid rows")
    for view in (image, image.transpose(0, 1)):
        size = tuple(view.shape[:2])
        policy = RegionPolicy(lambda h, w: (h, w), patch_size=16, window=(32, 32))
        box = [(0, 0, 0, size[1], size[0])]
        check([view], box, policy, weight, bias, IMAGENET_MEAN, IMAGENET_STD, dtype, backend, f"{size}")


@each_backend
@each_dtype
def test_padded_patch_is_the_bias(backend, dtype):
    bias = normal(9, key="bias", dtype=dtype)
    plan = plan_regions([(64, 20)], [(0, 0, 0, 20, 64)], sam_policy(edge=64))
    for given in (bias, None):
        embed = fold_patch_weight(weights((9, 3, 16, 16), dtype), IMAGENET_MEAN, IMAGENET_STD, given)
        tokens = roi_patch_embed([noise(64, 20)], plan, embed, backend=backend).view(4, 4, 9)
        want = torch.zeros(9, dtype=dtype) if given is None else bias
        assert (tokens[:, 2:] == want).all()
        assert (tokens[:, :2] != want).any(-1).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("merge", (1, 2))
def test_many_images_and_boxes(backend, dtype, merge):
    images = [noise(90, 120, 0), photo(longest=130), noise(300, 31, 1), noise(2, 3, 2)]
    h, w = images[1].shape[:2]
    boxes = [(1, 0, 0, w, h), (0, 7, 9, 100, 90), (3, 0, 0, 3, 2), (2, 0, 10, 31, 300), (0, 7, 9, 100, 90)]
    policy = qwen2_vl_policy(merge_size=merge, max_pixels=28 * 28 * 20)
    weight = weights((24, 3, 2, 14, 14), dtype)
    check(images, boxes, policy, weight, None, CLIP_MEAN, CLIP_STD, dtype, backend, "many")
    plan = plan_regions([tuple(image.shape[:2]) for image in images], boxes, policy)
    tokens = roi_patch_embed(images, plan, fold_patch_weight(weight, CLIP_MEAN, CLIP_STD), backend=backend)
    same = [tokens[plan.offsets[i] : plan.offsets[i + 1]] for i in (1, 4)]
    assert_same_bits(same[0], same[1], "the same box twice")


@each_backend
@pytest.mark.parametrize("shape", ((1, 3, 14, 14), (2, 3, 1, 14, 14), (5, 3, 3, 14, 14), (257, 3, 2, 14, 14)))
def test_widths_and_frames(backend, shape):
    image = noise(60, 80, "widths")
    check(
        [image],
        [(0, 0, 0, 80, 60)],
        qwen2_vl_policy(),
        weights(shape, torch.float32),
        None,
        CLIP_MEAN,
        CLIP_STD,
        torch.float32,
        backend,
        f"{shape}",
    )


@each_backend
@pytest.mark.parametrize("patch", (1, 2, 5, 8, 32))
def test_patch_sizes(backend, patch):
    image = noise(40, 70, "patch sizes")
    # Rows, and outputs with a rounded bias each, enough that an error's root mean square is no matter of luck.
    policy = RegionPolicy(lambda h, w: (patch * 8, patch * 12), patch_size=patch)
    weight, bias = weights((64, 3, patch, patch), torch.float32), normal(64, key="bias")
    check([image], [(0, 1, 2, 60, 39)], policy, weight, bias, CLIP_MEAN, CLIP_STD, torch.float32, backend, f"{patch}")


@each_backend
@each_model_dtype
def test_a_large_region(backend, dtype):
    """More rows than any strip or tile: 5,184 patches, one wrong row would show."""
    image = photo("retina", 1411)
    policy = qwen2_vl_policy(max_pixels=1_003_520, min_pixels=900_000)
    weight = weights((8, 3, 2, 14, 14), dtype)
    box = [(0, 0, 0, image.shape[1], image.shape[0])]
    check([image], box, policy, weight, None, CLIP_MEAN, CLIP_STD, dtype, backend, "large")


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", ("transposed", "CHW", "broadcast", "sliced"))
def test_image_strides(backend, dtype, layout):
    image = noise(70, 70, "embed strides")
    view = {
        "transposed": image.transpose(0, 1),
        "CHW": image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "broadcast": image[..., 1:2].expand(-1, -1, 3),
        "sliced": image[3:63:2, 1:69:3],
    }[layout]
    height, width = view.shape[:2]
    plan = plan_regions([(height, width)], [(0, 1, 2, width - 2, height - 1)], qwen2_vl_policy())
    embed = fold_patch_weight(weights((13, 3, 14, 14), dtype), CLIP_MEAN, CLIP_STD)
    want = roi_patch_embed([view.contiguous()], plan, embed, backend=backend)
    assert_same_bits(roi_patch_embed([view], plan, embed, backend=backend), want)


def embed_case(dtype: torch.dtype, width: int = 21) -> tuple[list[Tensor], RegionPlan, FoldedPatchEmbed]:
    images = [noise(64, 90, "into")]
    plan = plan_regions([(64, 90)], [(0, 0, 0, 90, 64), (0, 5, 6, 40, 60)], qwen2_vl_policy())
    return images, plan, fold_patch_weight(weights((width, 3, 2, 14, 14), dtype), CLIP_MEAN, CLIP_STD)


@each_backend
@each_dtype
@pytest.mark.parametrize("row", (0, 1, 17))
@pytest.mark.parametrize("wider", (0, 5))
def test_into_writes_its_rows_only(backend, dtype, row, wider):
    images, plan, embed = embed_case(dtype)
    want = roi_patch_embed(images, plan, embed, backend=backend)
    buffer = torch.full((plan.rows + 17, 21 + 2 * wider), float("nan"), dtype=dtype)
    before = buffer.clone()
    out = buffer[:, wider : wider + 21]
    assert roi_patch_embed_into(images, plan, embed, out, row, backend=backend) is None
    before[row : row + plan.rows, wider : wider + 21] = want
    assert_same_bits(buffer, before)


@each_backend
def test_into_nothing(backend):
    embed = embed_case(torch.float32)[2]
    plan = plan_regions([], [], qwen2_vl_policy())
    out = torch.full((3, 21), 7.0)
    for row in (0, 3):
        roi_patch_embed_into([], plan, embed, out, row, backend=backend)
    roi_patch_embed_into([], plan, embed, out[:0], 0, backend=backend)
    assert (out == 7).all()
    assert roi_patch_embed([], plan, embed, backend=backend).shape == (0, 21)


@each_backend
def test_into_rows_beyond_32_bits(backend):
    images, plan, embed = embed_case(torch.float32, 16)
    stride = (1 << 31) // 4 // plan.rows * 2
    out = virtual_bytes(plan.rows * stride * 4).view(torch.float32).as_strided((plan.rows, 16), (stride, 1))
    roi_patch_embed_into(images, plan, embed, out, backend=backend)
    assert_same_bits(out.contiguous(), roi_patch_embed(images, plan, embed, backend=backend))


@each_backend
@each_dtype
def test_runs_repeat_and_inputs_stay(backend, dtype):
    images, plan, embed = embed_case(dtype)
    kept = [t.clone() for t in (*images, embed.weight, embed.bias, plan.table)]
    first = roi_patch_embed(images, plan, embed, backend=backend)
    assert_same_bits(first, roi_patch_embed(images, plan, embed, backend=backend))
    for tensor, before in zip((*images, embed.weight, embed.bias, plan.table), kept, strict=True):
        assert_same_bits(tensor, before)


@each_dtype
def test_fold_is_linear_in_the_pixels(dtype):
    """W·(pixel − 128)/256 + bias[p] is the convolution; bias[v] leaves out the rows (columns) that are padding."""
    weight, bias = weights((7, 3, 3, 5, 5), dtype), normal(7, key="bias", dtype=dtype)
    embed = fold_patch_weight(weight, CLIP_MEAN, CLIP_STD, bias)
    assert embed.weight.shape == (7, 75) and embed.weight.dtype == dtype and embed.weight.is_contiguous()
    assert embed.bias.shape == (2, 6, 7) and embed.bias.dtype == torch.float32 and embed.patch_size == 5
    want = weight.double().sum(2).permute(0, 2, 3, 1) * 256 / (255 * torch.tensor(CLIP_STD, dtype=torch.float64))
    assert_same_bits(embed.weight, want.to(dtype).reshape(7, 75))
    at_zero = (128 - 255 * torch.tensor(CLIP_MEAN, dtype=torch.float64)) / 256
    rounded = embed.weight.double().view(7, 5, 5, 3) * at_zero
    for v in range(6):
        for axis, part in ((0, rounded[:, :v]), (1, rounded[:, :, :v])):
            torch.testing.assert_close(
                embed.bias[axis, v].double(), part.sum((1, 2, 3)) + bias.double(), rtol=0, atol=1e-6
            )


def test_fold_accepts_other_dtypes_and_layouts():
    weight = weights((7, 3, 2, 5, 5), torch.float32)
    plain = fold_patch_weight(weight, CLIP_MEAN, CLIP_STD, dtype=torch.bfloat16)
    assert plain.weight.dtype == torch.bfloat16 and plain.bias.dtype == torch.float32
    other = fold_patch_weight(weight.to(memory_format=torch.channels_last_3d), np.array(CLIP_MEAN), list(CLIP_STD))
    assert_same_bits(other.weight, fold_patch_weight(weight, CLIP_MEAN, CLIP_STD).weight)
    assert fold_patch_weight(weight.double(), CLIP_MEAN, CLIP_STD).bias.dtype == torch.float64


ALLOWED = """
import torch
from vpt_kernels import fold_patch_weight, plan_regions, qwen2_vl_policy, roi_patch_embed

weight = torch.randn(48, 3, 14, 14, generator=torch.Generator().manual_seed(1))
folded = fold_patch_weight(weight, (0.5,) * 3, (0.25,) * 3)
plan = plan_regions([(112, 112)], [(0, 0, 0, 112, 112)], qwen2_vl_policy())
image = torch.full((112, 112, 3), 255, dtype=torch.uint8)
with torch.backends.mkldnn.flags(enabled=False):
    exact = roi_patch_embed([image], plan, folded, backend="cpp")
ours, plain = (roi_patch_embed([image], plan, folded, backend=name) for name in ("cpp", "reference"))
print(max(((each - plain).abs().max() / plain.abs().max()).item() for each in (exact, ours)))
"""


@pytest.mark.parametrize("allowed", ["SSE41", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "ALL"])
def test_what_the_library_of_products_may_use_changes_rounding_at_most(allowed):
    """White pixels: without VNNI the byte products of oneDNN saturate."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": allowed}
    done = subprocess.run([sys.executable, "-c", ALLOWED], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-5
