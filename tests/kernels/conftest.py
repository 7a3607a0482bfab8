"""In a process with Triton's interpreter: which tests of the operators run on it, and on launches that suit it.

Everywhere else this file changes nothing. What a full-size tensor is about, and what tests/triton asks on smaller ones,
is left out: a program costs the interpreter milliseconds.
"""

from __future__ import annotations

import pytest

from tests.helpers import INTERPRETED

ALL_BUT: dict[str, tuple[str, ...]] = {
    "test_append_formats": (),
    "test_append_layouts": (),
    "test_append_norm": (),
    "test_overlap": (),
    "test_append_variants": (),
    "test_append_visual_kv": (
        # These are about no backend.
        "test_rotary_table_is_transformers",
        "test_rotary_table_of_one_position_and_other_theta",
    ),
}
"""Files of which every test is interpreted but these."""
ONLY: dict[str, tuple[str, ...]] = {
    "test_control_cross_attention": (
        "test_conv_flattening_order",
        "test_conv_strides",
        "test_into_equal_rows_and_empty_buffer",
        "test_into_skips_rows_beyond_32_bits",
        "test_into_the_buffer_that_holds_the_features",
        "test_into_writes_its_rows_only",
        "test_large_scores",
        "test_means_far_from_zero",
        "test_nan_control_of_an_empty_image",
        "test_nan_stays_in_its_image",
        "test_nothing_to_project",
        "test_offsets_beyond_32_bits",
        "test_row_strides",
        "test_runs_repeat_and_inputs_stay",
        "test_toy",
        "test_zero_key_and_no_control_return_f",
    ),
    "test_roi_bad_input": ("test_a_damaged_plan_is_not_followed",),
    "test_roi_patch_embed": (
        "test_into_nothing",
        "test_into_rows_beyond_32_bits",
        "test_padded_patch_is_the_bias",
    ),
    "test_roi_patches": (
        "test_broadcast_strides",
        "test_crop_comes_before_resize",
        "test_nothing_to_do",
        "test_offsets_beyond_32_bits",
        "test_read_only_image",
    ),
}
"""Files of which these tests are interpreted."""


def interpreted(item: pytest.Item) -> bool:
    name, file = getattr(item, "originalname", item.name), item.path.stem
    return name in ONLY[file] if file in ONLY else file in ALL_BUT and name not in ALL_BUT[file]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        return
    from tests.triton import interpreter

    here = [item for item in items if "tests/kernels" in item.path.as_posix()]
    chosen = [item for item in here if interpreted(item)]
    left_out = [item for item in here if item not in chosen]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in chosen:
        # The launch tests keep float16 in make test; here it is a third of the time.
        if item.path.stem in ALL_BUT and "float16" in item.name.split("[")[-1].split("-"):
            item.add_marker(pytest.mark.slow)
    interpreter.skip(chosen)


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter milliseconds whatever its size; tests/triton keeps the shipped blocks."""
    if not INTERPRETED:
        return
    from tests.triton import launches

    operator = {"append": launches.append, "overlap": launches.append, "control": launches.control, "roi": launches.roi}
    operator[request.node.path.stem.split("_")[1]](monkeypatch)
