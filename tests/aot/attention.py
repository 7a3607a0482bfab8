"""The kernels of the model's attention as they are launched."""

from __future__ import annotations

from tests.aot.variant import Variant
from vpt_model.network import attention_triton as attention

_TUNED = ("BLOCK_M", "BLOCK_N", "SPLIT")
_LENGTHS = dict.fromkeys(("starts", "past", "counts"), "*i32")


def _split(name: str, launch: attention.Launch, kind: str, registers: int, shared: int, **changes: object) -> Variant:
    constants = {
        "Q_HEADS": 12, "KV_HEADS": 2, "HEAD_DIM": 128, "BLOCK_M": launch.rows, "BLOCK_N": launch.keys, "BLOCK_D": 128,
        "SPLIT": launch.split,
    } | changes  # fmt: skip
    types = dict.fromkeys(("q", "keys", "values"), f"*{kind}") | dict.fromkeys(("sums", "weights"), "*fp32")
    # A warpgroup's instruction takes 64 rows; the tile of a decoded token has 16, which every target multiplies alike.
    wide = launch.rows >= 64
    return Variant(
        f"split {name}", attention.split_kernel, constants, types | _LENGTHS | {"scale": "fp32"}, registers, shared,
        launch.warps, launch.stages, unaligned=("scale", "tokens", "splits", "capacity"),
        tensor_cores=wide and kind != "fp32", batched=not wide and kind != "fp32", tuned=_TUNED,
    )  # fmt: skip


def _merge(name: str, launch: attention.Launch, kind: str, splits: int) -> Variant:
    constants = {"Q_HEADS": 12, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_SPLITS": splits, "SPLIT": launch.split}
    types = dict.fromkeys(("sums", "weights"), "*fp32") | {"out": f"*{kind}", "past": "*i32", "counts": "*i32"}
    # A warp per head of a token: many of them hide the latency of reading a few splits.
    return Variant(
        f"merge {name}", attention.merge_kernel, constants, types, 48, 64, 1, 3, unaligned=("tokens", "splits"),
        tuned=("SPLIT",),
    )  # fmt: skip


VARIANTS = (
    # Keys and values of one step are 16 KB each. 80 registers: six blocks of a decoded token share a multiprocessor, as
    # many as their shared memory allows on sm_90, so that reading never pauses.
    _split("decode bf16", attention.DECODE, "bf16", 80, 38 << 10),
    _split("decode fp16 7b", attention.DECODE, "fp16", 80, 38 << 10, Q_HEADS=28, KV_HEADS=4),
    # Two stages of keys and values, and 64 rows of q: one block of 8 warps, which may have every register.
    _split("append bf16", attention.APPEND, "bf16", 255, 81 << 10),
    # Outer products in 256 threads: two blocks a multiprocessor.
    _split("float32", attention.FLOAT32, "fp32", 128, 45 << 10),
    _merge("decode bf16", attention.DECODE, "bf16", 32),
    _merge("append bf16", attention.APPEND, "bf16", 4),
    _merge("float32", attention.FLOAT32, "fp32", 16),
)
