"""The kernels of the decode layer as they are launched."""

from __future__ import annotations

from tests.aot.variant import Variant
from vpt_model.network.decode import attention, head, linear_add, norm_linear, norm_swiglu
from vpt_model.network.decode.products import FLOAT32, ONE_ROW, ROWS, Launch

_TUNED = ("ROWS", "BLOCK_N", "BLOCK_K")
_FLOATS = {"residual", "x", "norm", "weight", "bias", "out"}
_TYPES = {
    "partials": "*fp32",
    "logits": "*fp32",
    "tops": "*fp32",
    "choices": "*i32",
    "tickets": "*i32",
    "tokens": "*i64",
    "eps": "fp32",
}


def _product(name: str, kernel: object, launch: Launch, kind: str, registers: int, shared: int, **more: int) -> Variant:
    constants = {"PDL": True, "ROWS": launch.rows, "BLOCK_N": launch.outputs, "BLOCK_K": launch.step} | more
    types = {
        p.name: f"*{kind}" if p.name in _FLOATS else _TYPES.get(p.name, "i32")
        for p in kernel.params
        if not p.is_constexpr
    }
    return Variant(
        name,
        kernel,
        constants,
        types,
        registers,
        shared,
        launch.warps,
        launch.stages,
        unaligned=("eps", "rows", "splits", "programs"),
        batched=launch is ROWS,
        tuned=_TUNED,
        streams=True,
    )


def _attention(name: str, kind: str, registers: int, shared: int, heads: int, kv_heads: int) -> Variant:
    constants = {
        "Q_HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": 64,
        "SECTION_T": 16,
        "SECTION_H": 24,
        "PDL": True,
        "BLOCK_M": attention.ROWS,
        "BLOCK_N": attention.KEYS,
        "BLOCK_HALF": 64,
        "SPLIT": attention.SPLIT,
    }
    types = dict.fromkeys(("qkv", "keys", "values", "out"), f"*{kind}")
    types |= dict.fromkeys(("table", "sums", "weights"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("positions", "slots", "starts", "past", "counts", "tickets"), "*i32")
    return Variant(
        f"decode attention {name}",
        attention.decode_attention_kernel,
        constants,
        types,
        registers,
        shared,
        attention.WARPS,
        attention.STAGES,
        unaligned=(
            "scale",
            "table_rows",
            "splits",
            "capacity",
            "room",
            "positions_axis",
            "past",
            "counts",
            "slots",
            "starts",
            "positions",
        ),
        batched=kind != "fp32",
        tuned=("BLOCK_M", "BLOCK_N", "SPLIT"),
        options={"enable_fp_fusion": False},
        streams=True,
        multiplies=kind == "fp32",
    )


# One row: 32 weights of a step and as many sums a thread, twice for gates and ups: four blocks of 4 warps a
# multiprocessor (128; sm_80 schedules more loads ahead and keeps three), 32 KB in flight. Rows: two warps a block with
# every register; shared memory holds four stages of weights, of gates and ups two blocks of it fit. Float32 rows are
# outer products in 128 threads.
_RESOURCES = {
    "one bf16": (ONE_ROW, "bf16"),
    "one fp32": (ONE_ROW, "fp32"),
    "rows bf16": (ROWS, "bf16"),
    "rows fp16": (ROWS, "fp16"),
    "rows fp32": (FLOAT32, "fp32"),
}
_KERNELS = {
    # registers of one row, of rows and of float32 rows; KB of shared memory of rows
    "norm linear": (norm_linear.norm_linear_kernel, (80, 168, 48), 58, {}),
    "norm swiglu": (norm_swiglu.norm_swiglu_kernel, (136, 216, 128), 82, {}),
    "linear add": (linear_add.linear_add_kernel, (80, 96, 48), 48, {}),
    "head": (head.head_kernel, (80, 168, 64), 48, {"TILES": head.TILES, "MERGED": head.MERGED}),
}

VARIANTS = (
    *(
        _product(
            f"{kernel} {name}",
            function,
            launch,
            kind,
            registers[(ONE_ROW, ROWS, FLOAT32).index(launch)],
            (shared if launch is ROWS else 8) << 10,
            **more,
        )
        for kernel, (function, registers, shared, more) in _KERNELS.items()
        for name, (launch, kind) in _RESOURCES.items()
    ),
    # Keys and values of one step are 16 KB each, two stages of them: four or five blocks share a multiprocessor.
    _attention("bf16", "bf16", 128, 38 << 10, 12, 2),
    _attention("fp16 7b", "fp16", 128, 38 << 10, 28, 4),
    _attention("fp32", "fp32", 128, 77 << 10, 12, 2),
)
