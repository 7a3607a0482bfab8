"""One-line faults in the Triton sources: name, file, old text, new text, test files.

Left out is what the interpreter cannot show: a product in TF32 and missing masks at the end of a launch's last block,
which the compiled instructions and compute-sanitizer are checked for.
"""

from __future__ import annotations

PATCHES = "triton/test_roi_patches_triton kernels/test_roi_patches kernels/test_roi_bad_input"
EMBED = "triton/test_roi_patch_embed_triton kernels/test_roi_patch_embed"
CONTROL = "triton/test_control_cross_attention_triton kernels/test_control_cross_attention"
APPEND = (
    "kernels/test_append_formats kernels/test_append_layouts kernels/test_append_variants "
    "kernels/test_append_visual_kv kernels/test_append_norm"
)
LAUNCHES = "triton/test_launches_triton"

RESAMPLE, CONTROL_FILE = "roi_patch_embed/triton_resample.py", "control_cross_attention/triton.py"
APPEND_FILE = "append_visual_kv/triton.py"

TRITON_ROWS: list[tuple[str, str, str, str, str]] = [
    ("passes truncate", RESAMPLE, "byte = (total + _HALF) >> _BITS", "byte = total >> _BITS", PATCHES),
    (
        "intermediate not clamped", RESAMPLE,
        "tl.minimum(tl.maximum(byte, 0), 255) - ZERO", "tl.minimum(byte, 255) - ZERO", PATCHES,
    ),
    ("a = -0.75", RESAMPLE, "(((x - 5.0) * x + 8.0) * x - 4.0) * -0.5", "(((x - 5.0) * x + 8.0) * x - 4.0) * -0.75",
     PATCHES),
    (
        "NEAREST in closed form", RESAMPLE,
        "if rounds & (tl.max(near.to(tl.int32)) > 0):", "if rounds & (tl.max(near.to(tl.int32)) > 1):", PATCHES,
    ),
    (
        "taps beyond the crop's edge", RESAMPLE,
        "tl.minimum((center + support + 0.5).to(tl.int32), in_size) - first",
        "(center + support + 0.5).to(tl.int32) - first", PATCHES,
    ),
    (
        "coefficients rounded up", RESAMPLE,
        "tl.where(weight < 0.0, fixed - 0.5, fixed + 0.5).to(tl.int32)", "(fixed + 0.5).to(tl.int32)", PATCHES,
    ),
    (
        "crop's offset left out", RESAMPLE,
        "(i + field(region, _LEFT + axis)) * tl.load", "i * tl.load", PATCHES,
    ),
    (
        "pass order ignored", "roi_patch_embed/triton.py",
        "outer_axis = 1 - field(region, _VERTICAL_FIRST)", "outer_axis = 1 - 0 * field(region, _VERTICAL_FIRST)",
        PATCHES,
    ),
    (
        "window's offset ignored", RESAMPLE,
        "(at + field(region, _WINDOW_LEFT + axis)).to(tl.float64)", "at.to(tl.float64)", PATCHES + " " + EMBED,
    ),
    (
        "part of a tile left over", "roi_patch_embed/triton_staging.py",
        "-(-region.grid_width * unit // pitch_x)", "max(1, region.grid_width * unit // pitch_x)", PATCHES,
    ),
    (
        "table: box beyond the image", "roi_patch_embed/triton_staging.py",
        "region.left <= width - region.width", "region.left <= width", PATCHES,
    ),
    (
        "patches of a block in column order", RESAMPLE,
        "within = tl.where(axis == 0, 1, merge)", "within = tl.where(axis == 0, merge, 1)", EMBED,
    ),
    (
        "padding's bias dropped", "roi_patch_embed/triton.py",
        "tl.load(bias + entry[:, None] * embed + column[None, :])",
        "tl.load(bias + entry[:, None] * 0 + column[None, :])", EMBED,
    ),
    (
        "low part of float32 weights dropped", RESAMPLE,
        "part = tl.dot(operand, low)\n", "part = tl.dot(operand, low * 0)\n", EMBED,
    ),
    (
        "pass order ignored in one launch", "roi_patch_embed/triton_fused.py",
        "outer_axis = 1 - field(region, _VERTICAL_FIRST)", "outer_axis = 1 - 0 * field(region, _VERTICAL_FIRST)",
        EMBED,
    ),
    (
        "one launch: rest of the columns dropped", "roi_patch_embed/triton_fused.py",
        "for start in range(0, embed, BN):", "for start in range(0, embed // BN * BN, BN):", EMBED,
    ),
    (
        "beta dropped", CONTROL_FILE,
        "score += tl.load(condition + beta)\n", "score += 0.0 * tl.load(condition + beta)\n", CONTROL,
    ),
    (
        "beta dropped between images", CONTROL_FILE,
        "score += tl.load(of_image + beta, mask=is_token, other=0.0)", "score += 0.0", CONTROL,
    ),
    (
        "moments merged as if means were equal", CONTROL_FILE,
        "tl.sum(deviation * deviation, 1) + delta * delta * (count * added / total)",
        "tl.sum(deviation * deviation, 1)", CONTROL,
    ),
    (
        "first token of an image to the one before", CONTROL_FILE,
        "begins = tl.load(cu_seqlens + middle * cu_stride).to(tl.int64) <= token",
        "begins = tl.load(cu_seqlens + middle * cu_stride).to(tl.int64) < token", CONTROL,
    ),
    (
        "conv's axes swapped", CONTROL_FILE,
        "cell // KERNEL * x_height + cell % KERNEL * x_width", "cell // KERNEL * x_width + cell % KERNEL * x_height",
        CONTROL,
    ),
    ("rows ignored", CONTROL_FILE, "row = token\n    if SCATTER:\n        row = tl.load(rows + token * rows_stride, "
     "mask=is_token, other=-1).to(tl.int64)\n    is_stored = is_token & (row >= 0) & (row < out_rows)\n    place",
     "row = token\n    is_stored = is_token & (row >= 0) & (row < out_rows)\n    place", CONTROL),
    (
        "condition's bias dropped", CONTROL_FILE,
        "total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]", "total += 0.0", CONTROL,
    ),
    (
        "height and width swapped", APPEND_FILE,
        "positions_ptr + axis.to(tl.int64)", "positions_ptr + (axis * 2 % 3).to(tl.int64)",
        APPEND,
    ),
    (
        "interleaved: width's section as long as height's", APPEND_FILE,
        "(pair < 3 * SECTION_W)", "(pair < 3 * SECTION_H)", APPEND,
    ),
    ("slot of capacity stored", APPEND_FILE, "(slot < capacity)", "(slot <= capacity)", APPEND),
    ("V's stride taken from K", APPEND_FILE, "slot * stride_v_cache_row", "slot * stride_k_cache_row", APPEND),
    (
        "V's page stride taken from K", APPEND_FILE,
        "page * stride_v_cache_page", "page * stride_k_cache_page", APPEND,
    ),
    (
        "float8 not scaled", APPEND_FILE,
        "tl.div_rn(x.to(tl.float32), tl.broadcast_to(factor, x.shape))",
        "x.to(tl.float32) + tl.broadcast_to(factor, x.shape) * 0.0", APPEND,
    ),
    (
        "float8 scale of the first head", APPEND_FILE,
        "(heads if HEAD_SCALES else heads * 0)", "heads * 0", APPEND,
    ),
    ("float8 ties away from zero", APPEND_FILE, "0x7FFFF + ((magnitude >> 20) & 1)", "0x80000", APPEND),
    (
        "float8 NaN lost", APPEND_FILE,
        "tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7F, rounded)", "rounded", APPEND,
    ),
    (
        "unrotated part dropped", APPEND_FILE,
        "k_rest = k_row + rest[None, None, :]",
        "k_rest, rest_mask = k_row + rest[None, None, :], rest_mask & (HALF < 0)", APPEND,
    ),
    (
        "norm's quotient not rounded", APPEND_FILE,
        "(x.to(tl.float32) * inverse).to(x.dtype).to(tl.float32)", "x.to(tl.float32) * inverse", APPEND,
    ),
    ("norm of the rotated channels alone", APPEND_FILE, "+ tl.sum(behind * behind, 2)", "", APPEND),
    (
        "last row of the table unreachable", APPEND_FILE,
        "tl.minimum(tl.maximum(position, 0), table_rows - 1)", "tl.minimum(tl.maximum(position, 0), table_rows - 2)",
        APPEND + " " + LAUNCHES,
    ),
]  # fmt: skip
