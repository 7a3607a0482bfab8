"""The table of coefficients and NEAREST sources that one launch makes, against the reference's, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits, noise
from vpt_kernels import RegionPolicy, plan_regions, qwen2_vl_policy, sam_policy
from vpt_kernels.roi_patch_embed import triton as kernels
from vpt_kernels.roi_patch_embed import triton_staging as staging
from vpt_kernels.roi_patch_embed.geometry import FILTERS, Column
from vpt_kernels.roi_patch_embed.reference import nearest_indices, resampling_coefficients

UNWRITTEN = -(2**31)


def made(sizes: list[tuple[int, int]], plan) -> tuple[Tensor, list[list[int]]]:
    """Return the table of a plan, as the call makes it, and the records that say where things stand in it."""
    images = [noise(*size, "table") for size in sizes]
    staged = staging.stage(images, plan.table, plan.rows, plan.row_bytes, 32, in_patches=False)
    table = torch.full((staged.words,), UNWRITTEN, dtype=torch.int32)
    blocks = {"OUTPUTS": staging.FILL_OUTPUTS, "TAPS": kernels.FILL_TAPS, "PDL": False}
    kernels.table_kernel[(staged.fills, 2)](staged.records, len(plan.table), table, **blocks)
    return table, staged.records.view(len(plan.table), -1).tolist()


def expected_rows(row: list[int], axis: int) -> tuple[Tensor, Tensor]:
    """Return first tap and coefficients of the window's outputs along an axis (0: x), zeros behind the last tap."""
    inputs, outputs = row[Column.NEAREST_WIDTH_3 + axis], row[Column.RESIZED_WIDTH + axis]
    first, weights = resampling_coefficients(inputs, outputs, FILTERS[row[Column.FILTER]])
    begin = row[Column.WINDOW_LEFT + axis]
    window = slice(begin, begin + row[Column.GRID_WIDTH + axis] * row[Column.PATCH_SIZE])
    return first[window], weights[window]


def expected_sources(row: list[int], axis: int) -> Tensor | None:
    """Return where in the crop the coordinates lie that the NEAREST steps leave, or None where they move none."""
    sizes = row[Column.WIDTH + axis : Column.RESIZED_WIDTH : 2]
    if len(set(sizes)) == 1:
        return None
    source = torch.arange(sizes[0])
    for before, after in zip(sizes, sizes[1:]):
        source = source[nearest_indices(before, after)] if before != after else source
    return source


def odd_sizes(resample: str) -> RegionPolicy:
    return RegionPolicy(lambda h, w: (28, 42), 14, resample=resample)


@pytest.mark.parametrize(
    "policy",
    (
        odd_sizes("bicubic"),
        odd_sizes("bilinear"),
        qwen2_vl_policy(28 * 28, 56 * 56),
        qwen2_vl_policy(28 * 28, 28 * 28, longest_edge=60),
        sam_policy(edge=48),
        RegionPolicy(lambda h, w: (40, 46), 14, window=(28, 28), anchor="center"),
    ),
    ids=("bicubic", "bilinear", "Qwen2-VL", "nearest", "SAM", "centre"),
)
def test_every_number_is_the_reference_s(policy):
    """Growth, reductions, equal size, a window inside, padding; more than one program an axis, several regions."""
    sizes = [(61, 83), (200, 31), (28, 42)]
    boxes = [(0, 0, 0, 83, 61), (0, 3, 5, 40, 20), (1, 0, 0, 31, 200), (2, 0, 0, 42, 28)]
    plan = plan_regions(sizes, boxes, policy)
    table, records = made(sizes, plan)
    seen = torch.zeros(len(table), dtype=torch.bool)
    for record in records:
        for axis in (0, 1):
            words, begin = record[staging.ROW_WORDS + axis], record[staging.TABLE + axis]
            first, weights = expected_rows(record, axis)
            rows = table[begin : begin + len(first) * words].view(-1, words)
            seen[begin : begin + len(first) * words] = True
            assert torch.equal(rows[:, 0].long(), first)
            count = rows[:, 1:2]
            assert (count >= 1).all() and (count <= words - 2).all()
            tap = torch.arange(words - 2)
            assert (rows[:, 2:][tap >= count] == UNWRITTEN).all()
            found = torch.where(tap < count, rows[:, 2:], 0)
            both = max(words - 2, weights.shape[1])
            padded = [torch.nn.functional.pad(x, (0, both - x.shape[1])) for x in (found, weights)]
            assert_same_bits(padded[0], padded[1], f"{record} {axis=}")
            sources, begin = expected_sources(record, axis), record[staging.SOURCES + axis]
            assert (begin < 0) == (sources is None)
            if sources is not None:
                assert torch.equal(table[begin : begin + len(sources)].long(), sources)
                seen[begin : begin + len(sources)] = True
    assert seen.all()
