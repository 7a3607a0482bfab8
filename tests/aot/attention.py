"""The kernels of the model's attention as they are launched."""

from __future__ import annotations

from tests.aot.variant import Variant
from vpt_model.network import attention_triton as attention

_TUNED = ("BLOCK_M", "BLOCK_N", "SPLIT")
_LENGTHS = dict.fromkeys(("starts", "past", "counts"), "*i32")


def _split(name: str, launch: attention.Launch, kind: str, registers: int, shared: int, **changes: object) -> Variant:
    constants = {
        "Q_HEADS": 12,
        "KV_HEADS": 2,
        "HEAD_DIM": 128,
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.keys,
        "BLOCK_D": 128,
        "SPLIT": launch.split,
    } | changes
    types = dict.fromkeys(("q", "keys", "values", "out"), f"*{kind}") | dict.fromkeys(("sums", "weights"), "*fp32")
    types["tickets"] = "*i32"
    # A warpgroup's instruction takes 64 rows; the tile of a decoded token has 16, which every target multiplies alike.
    wide = launch.rows >= 64
    return Variant(
        f"split {name}",
        attention.split_kernel,
        constants,
        types | _LENGTHS | {"scale": "fp32"},
        registers,
        shared,
        launch.warps,
        launch.stages,
        unaligned=("scale", "tokens", "splits", "capacity"),
        tensor_cores=wide and kind != "fp32",
        batched=not wide and kind != "fp32",
        tuned=_TUNED,
    )


VARIANTS = (
    # Keys and values of one step are 16 KB each. 96 registers: five blocks of a token's queries share a multiprocessor,
    # one less than their shared memory allows on sm_90; the last one's merge takes them.
    _split("decode bf16", attention.DECODE, "bf16", 96, 38 << 10),
    _split("decode fp16 7b", attention.DECODE, "fp16", 96, 38 << 10, Q_HEADS=28, KV_HEADS=4),
    # Two stages of keys and values, and 64 rows of q: one block of 8 warps, which may have every register.
    _split("append bf16", attention.APPEND, "bf16", 255, 81 << 10),
    # Outer products in 256 threads: two blocks a multiprocessor.
    _split("float32", attention.FLOAT32, "fp32", 128, 45 << 10),
)
