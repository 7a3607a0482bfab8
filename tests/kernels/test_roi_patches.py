"""Every byte of `roi_patches` is Pillow's, whatever the geometry and the layout of the images."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import SEED, assert_same_bits, each_backend, noise, numbers, patchify, photo, virtual_bytes
from tests.kernels.pillow_parity import KINDS, PILLOW, cases, mismatch, regularize
from vpt_kernels import RegionPolicy, dinov2_policy, plan_regions, qwen2_vl_policy, roi_patches, sam_policy

GEOMETRIES = 390


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ("hv", "installed"))
def test_random_geometries_equal_pillow(backend, kind, order):
    """hv and installed coincide up to Pillow 12.1; the script beside this file runs on the versions that differ."""
    every = GEOMETRIES if order == "hv" or PILLOW >= (12, 2) else GEOMETRIES // 6
    wrong = [text for case in cases(every, kinds=(kind,)) if (text := mismatch(case, order, backend))]
    assert not wrong, f"seed {SEED}: {len(wrong)} geometries differ\n" + "\n".join(wrong[:10])


def pillow_resized(image: torch.Tensor, box, size, kind=Image.Resampling.BICUBIC) -> torch.Tensor:
    resized = Image.fromarray(image.numpy()).crop(box).resize((size[1], size[0]), kind)
    return torch.from_numpy(np.array(resized))


@each_backend
def test_crop_comes_before_resize(backend):
    """Taps stop at the crop's edge: the pixels around a box do not matter."""
    inside = noise(57, 80, "inside")
    plan = plan_regions([(120, 130)], [(0, 30, 20, 110, 77)], qwen2_vl_policy(pass_order="installed"))
    assert plan.grids == ((4, 6),)
    results = []
    for fill in (0, 255):
        image = torch.full((120, 130, 3), fill, dtype=torch.uint8)
        image[20:77, 30:110] = inside
        results.append(roi_patches([image], plan, backend=backend))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], patchify(pillow_resized(inside, (0, 0, 80, 57), (56, 84)), 14, 2))


@each_backend
@pytest.mark.parametrize(
    "policy", (qwen2_vl_policy(), dinov2_policy(), sam_policy()), ids=("qwen2_vl", "dinov2", "sam")
)
@pytest.mark.parametrize("level", (0, 119, 128, 255))
def test_flat_images_stay_flat(backend, policy, level):
    """Normalised 22-bit coefficients may not sum to one, so Pillow's own result is the reference, even here."""
    image = torch.full((45, 131, 3), level, dtype=torch.uint8)
    plan = plan_regions([(45, 131)], [(0, 1, 2, 130, 44)], policy)
    resized_h, resized_w = policy.fit(42, 129)
    kind = Image.Resampling.BILINEAR if policy.resample == "bilinear" else Image.Resampling.BICUBIC
    resized = pillow_resized(image, (1, 2, 130, 44), (resized_h, resized_w), kind)
    values = set(roi_patches([image], plan, backend=backend).unique().tolist())
    assert values <= set(resized.unique().tolist()) | {128}


@each_backend
@pytest.mark.parametrize("edge", (28, 29, 224, 512))
def test_nearest_chain_at_every_size(backend, edge):
    """Where NEAREST samples is an accumulated double sum: compare every width up to 1100 with Pillow."""
    rng = numbers("nearest", edge)
    policy = RegionPolicy(fit=lambda h, w: (h, w), patch_size=1, regularize_edge=edge)
    for width in rng.choice(np.arange(1, 1101), 60, replace=False).tolist() + [513, 561, 569, 644, 685, 691, 694, 725]:
        height = int(rng.integers(1, 40))
        for image in (noise(height, width, edge), noise(width, height, edge)):
            h, w = image.shape[:2]
            want = torch.from_numpy(np.array(regularize(Image.fromarray(image.numpy()), edge)))
            actual = roi_patches([image], plan_regions([(h, w)], [(0, 0, 0, w, h)], policy), backend=backend)
            assert_same_bits(actual, want.reshape(-1, 3), f"{h}x{w} at edge {edge}, seed {SEED}")


LAYOUTS = {
    "CHW storage": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "WHC storage": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "RGBA storage": lambda t: torch.cat([t, torch.full_like(t[..., :1], 77)], -1)[..., :3],
    "BGR reversed by a view": lambda t: torch.from_numpy(t.numpy()[..., ::-1].copy()).flip(-1),
    "every second pixel": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1)[1::2, ::2],
    "padded rows": lambda t: torch.cat([t, torch.zeros_like(t[:, :5])], 1)[:, : t.shape[1]],
    "offset in storage": lambda t: torch.cat([torch.zeros(7, dtype=torch.uint8), t.flatten()])[7:].view(t.shape),
}


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", (qwen2_vl_policy(longest_edge=60), sam_policy(edge=64)), ids=("nearest", "direct"))
def test_any_strides(backend, layout, policy):
    image = noise(61, 83, "strides")
    view = LAYOUTS[layout](image)
    assert torch.equal(view, image)
    plan = plan_regions([(61, 83)], [(0, 3, 1, 80, 59), (0, 0, 0, 83, 61)], policy)
    assert_same_bits(roi_patches([view], plan, backend=backend), roi_patches([image], plan, backend=backend))


@each_backend
def test_broadcast_strides(backend):
    """A grey image expanded to three channels has channel stride 0; a repeated row has row stride 0."""
    grey = noise(50, 60, "grey")[..., :1]
    plan = plan_regions([(50, 60)], [(0, 2, 3, 57, 49)], qwen2_vl_policy())
    for view in (
        grey.expand(-1, -1, 3),
        noise(1, 60, "row").expand(50, -1, -1),
        noise(50, 1, "column").expand(-1, 60, -1),
    ):
        want = roi_patches([view.contiguous()], plan, backend=backend)
        assert_same_bits(roi_patches([view], plan, backend=backend), want)


@each_backend
def test_read_only_image(backend, tmp_path):
    """Pages mapped read-only: a write would end the process."""
    (tmp_path / "pixels").write_bytes(noise(30, 40, "read-only").numpy().tobytes())
    frozen = np.memmap(tmp_path / "pixels", dtype=np.uint8, mode="r", shape=(30, 40, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks, once per process, that it cannot protect the array
        image = torch.from_numpy(frozen)
    plan = plan_regions([(30, 40)], [(0, 0, 0, 40, 30)], qwen2_vl_policy(longest_edge=35))
    want = roi_patches([image.clone()], plan, backend=backend)
    assert_same_bits(roi_patches([image], plan, backend=backend), want)


@each_backend
def test_offsets_beyond_32_bits(backend):
    image = noise(3, 5, "far")
    row = (1 << 31) + 11
    storage = virtual_bytes(2 * row + 15)
    far = storage.as_strided((3, 5, 3), (row, 3, 1))
    far.copy_(image)
    plan = plan_regions([(3, 5)], [(0, 1, 0, 5, 3)], qwen2_vl_policy())
    assert_same_bits(roi_patches([far], plan, backend=backend), roi_patches([image], plan, backend=backend))
    planar = storage.as_strided((3, 5, 3), (row, 1, 5))
    planar.copy_(image)
    assert_same_bits(roi_patches([planar], plan, backend=backend), roi_patches([image], plan, backend=backend))
    channel = storage.as_strided((3, 5, 3), (5, 1, row))
    channel.copy_(image)
    assert_same_bits(roi_patches([channel], plan, backend=backend), roi_patches([image], plan, backend=backend))


@each_backend
@pytest.mark.parametrize("transposed", (False, True), ids=("rows", "columns"))
@pytest.mark.parametrize(
    "lines, pixels, stride, most",
    ((256, 5, (1 << 24) + 11, 1 << 20), (240, 240, (1 << 26) + 11, 56 * 56)),
    ids=("tile", "lines at once"),
)
def test_tiles_that_begin_beyond_32_bits(backend, lines, pixels, stride, most, transposed):
    """No line is so far from the next: it is where a tile begins that does not fit, or where its later lines do."""
    image = noise(lines, pixels, "far tiles")
    far = virtual_bytes((lines - 1) * stride + 3 * pixels).as_strided((lines, pixels, 3), (stride, 3, 1))
    far.copy_(image)
    if transposed:
        image, far = image.transpose(0, 1).contiguous(), far.transpose(0, 1)
    height, width = image.shape[:2]
    plan = plan_regions([(height, width)], [(0, 0, 0, width, height)], qwen2_vl_policy(max_pixels=most))
    assert_same_bits(roi_patches([far], plan, backend=backend), roi_patches([image], plan, backend=backend))


@each_backend
@pytest.mark.parametrize("policy", (qwen2_vl_policy(), qwen2_vl_policy(merge_size=1), dinov2_policy(), sam_policy()))
def test_several_images_and_boxes(backend, policy):
    """Rows of every region stand at its offset and equal the region planned alone."""
    images = [noise(90, 120, 0), noise(300, 31, 1), noise(1, 1, 2), noise(64, 64, 3), photo(longest=130)]
    sizes = [tuple(image.shape[:2]) for image in images]
    h, w = sizes[4]
    boxes = [
        (4, 0, 0, w, h),
        (0, 119, 89, 120, 90),
        (3, 5, 6, 50, 61),
        (0, 0, 0, 120, 90),
        (3, 5, 6, 50, 61),
        (2, 0, 0, 1, 1),
    ]
    plan = plan_regions(sizes, boxes, policy)
    together = roi_patches(images, plan, backend=backend)
    assert together.shape == (plan.rows, 3 * policy.patch_size**2) and together.is_contiguous()
    assert len(plan.grids) == len(boxes) and plan.offsets[0] == 0 and plan.offsets[-1] == plan.rows
    for number, box in enumerate(boxes):
        alone = plan_regions([sizes[box[0]]], [(0, *box[1:])], policy)
        assert plan.grids[number] == alone.grids[0]
        rows = together[plan.offsets[number] : plan.offsets[number + 1]]
        assert_same_bits(rows, roi_patches([images[box[0]]], alone, backend=backend), f"box {number}")


@each_backend
def test_nothing_to_do(backend):
    for images in ([], [noise(20, 20)]):
        plan = plan_regions([tuple(image.shape[:2]) for image in images], [], qwen2_vl_policy())
        assert plan.rows == 0 and plan.grids == () and plan.offsets == (0,)
        assert roi_patches(images, plan, backend=backend).shape == (0, 588)


@each_backend
def test_inputs_stay_and_runs_repeat(backend):
    image = noise(200, 150, "repeat")
    before = image.clone()
    plan = plan_regions([(200, 150)], [(0, 10, 20, 140, 190)], qwen2_vl_policy(longest_edge=100))
    table = plan.table.clone()
    first = roi_patches((image,), plan, backend=backend)
    second = roi_patches((image,), plan, backend=backend)
    assert_same_bits(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert_same_bits(image, before)
    assert torch.equal(plan.table, table)


@each_backend
def test_very_large_region(backend):
    """4000×3000 to Qwen2-VL's limit of a million pixels; tap windows of several pixels on both axes."""
    image = photo("retina", 1411).repeat(3, 3, 1)[:4000, :3000].contiguous()
    plan = plan_regions([(4000, 3000)], [(0, 0, 0, 3000, 4000)], qwen2_vl_policy(max_pixels=1_003_520))
    (grid,) = plan.grids
    want = patchify(pillow_resized(image, (0, 0, 3000, 4000), (grid[0] * 14, grid[1] * 14)), 14, 2)
    assert_same_bits(roi_patches([image], plan, backend=backend), want)
