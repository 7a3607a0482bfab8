"""The kernels of roi_patches and roi_patch_embed as they are launched."""

from __future__ import annotations

from tests.aot.variant import Variant
from vpt_kernels.roi_patch_embed import triton as roi
from vpt_kernels.roi_patch_embed import triton_fused as fused
from vpt_kernels.roi_patch_embed import triton_tables as tables
from vpt_kernels.roi_patch_embed.geometry import padded_columns
from vpt_kernels.roi_patch_embed.triton_staging import FILL_OUTPUTS

_TUNED = ("TILE", "CHUNK", "BM", "BN", "BK", "SIDE")
_EXACT = {"enable_fp_fusion": False}


def _resample(name: str, entry: int | None) -> Variant:
    launch = roi.RESAMPLING
    constants = {"ENTRY": entry, "TILE": launch.tile, "CHUNK": launch.chunk, "PDL": False}
    # One block of 8 warps may use every register: two matrices of sums and 64-bit addresses of a tile of bytes.
    return Variant(
        f"resample {name}",
        roi.resample_kernel,
        constants,
        {"regions_ptr": "*i64", "tables_ptr": "*i32", "out_ptr": "*u8"},
        255,
        16 << 10,
        launch.warps,
        1,
        unaligned=("count", "stride_out_row"),
        tensor_cores=True,
        tuned=_TUNED,
        options=_EXACT,
    )


def _table() -> Variant:
    constants = {"OUTPUTS": FILL_OUTPUTS, "TAPS": roi.FILL_TAPS, "PDL": False}
    # One warp a block, and few blocks: nothing is to be hidden but the divisions' own latency.
    return Variant(
        "table",
        tables.table_kernel,
        constants,
        {"regions_ptr": "*i64", "tables_ptr": "*i32"},
        128,
        1 << 10,
        1,
        1,
        unaligned=("count",),
        options=_EXACT,
    )


def _embed(size: str, kind: str, registers: int, patch: int = 14) -> Variant:
    block, row_bytes = roi.PRODUCTS[size], 3 * patch * patch
    # As `fold_patch_weight` pads it: only so are rows of 588 numbers read by 16 bytes.
    stride, entry = roi.patch_row_layout(row_bytes)
    constants = {
        "K": padded_columns(row_bytes),
        "STRIDE_ROW": stride,
        "ENTRY": entry,
        "BM": block.rows,
        "BN": block.columns,
        "BK": block.k,
        "PDL": False,
    }
    types = {"patches_ptr": "*u8", "weight_ptr": f"*{kind}", "bias_ptr": "*fp32", "out_ptr": f"*{kind}"}
    # Two blocks a multiprocessor (three of 4 warps), so that one computes while the other waits for its operands.
    return Variant(
        f"embed {size} {kind} {patch}",
        roi.embed_kernel,
        constants,
        types,
        registers,
        80 << 10,
        block.warps,
        block.stages,
        unaligned=("rows",),
        tensor_cores=True,
        streams=True,
        tuned=_TUNED,
    )


def _strip(kind: str) -> Variant:
    launch = fused.STRIP
    constants = {
        "P": 14,
        "WEIGHT_ROW": padded_columns(588),
        "SIDE": launch.side,
        "CHUNK": launch.chunk,
        "BN": launch.columns,
    }
    types = {"regions_ptr": "*i64", "weight_ptr": f"*{kind}", "bias_ptr": "*fp32", "out_ptr": f"*{kind}"}
    # Sixteen patches' pixels stay in registers, which leaves too few for the prologue's addresses and coefficients:
    # up to 512 bytes a thread go through local memory. The weight's share of one step is what shared memory holds.
    return Variant(
        f"strip {kind}",
        fused.strip_kernel,
        constants,
        types,
        255,
        96 << 10,
        launch.warps,
        1,
        unaligned=("count",),
        tensor_cores=True,
        batched=True,
        spilled=512,
        tuned=_TUNED,
        options=_EXACT,
    )


VARIANTS = (
    _table(),
    _resample("tokens", 588),
    _resample("pixels", None),
    _embed("few rows", "bf16", 168),
    _embed("few rows", "fp16", 168, patch=16),
    _embed("many rows", "bf16", 255),
    _embed("float32", "fp32", 168),
    _strip("bf16"),
    _strip("fp32"),
)
