"""The kernels of append_visual_kv and control_cross_attention as they are launched."""

from __future__ import annotations

from tests.aot.variant import Variant
from vpt_kernels.append_visual_kv import triton as append
from vpt_kernels.control_cross_attention import triton as control
from vpt_kernels.control_cross_attention import triton_condition


def _append(name: str, launch: tuple, kind: str, registers: int, **changes: object) -> Variant:
    block_tokens, warps = launch
    float8, normed = changes.pop("FLOAT8", False), changes.pop("normed", False)
    cache = "*u8" if float8 else f"*{kind}"
    constants = {
        "Q_HEADS": 12,
        "KV_HEADS": 2,
        "HEAD_DIM": 128,
        "HALF": 64,
        "SECTION_T": 16,
        "SECTION_H": 24,
        "SECTION_W": 24,
        "INTERLEAVED": False,
        "PAGED": False,
        "FLOAT8": float8,
        "K_HEAD_SCALES": False,
        "V_HEAD_SCALES": False,
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_HEADS": append.BLOCK_HEADS,
        "BLOCK_HALF": 64,
        "BLOCK_REST": 1,
        "BLOCK_DIM": 128,
    } | changes
    types = dict.fromkeys(("q_ptr", "q_out_ptr", "k_ptr", "v_ptr"), f"*{kind}")
    types |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), cache)
    types |= {"table_ptr": "*fp32", "positions_ptr": "*i64", "slots_ptr": "*i64", "norm_eps": "fp32"}
    types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32" if float8 else "constexpr")
    types |= dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), f"*{kind}" if normed else "constexpr")
    unaligned = (
        "norm_eps",
        "tokens",
        "table_rows",
        "capacity",
        "page_size",
        "stride_positions_axis",
        "stride_positions_token",
        "stride_slots_token",
    )
    return Variant(
        f"append {name}",
        append.append_kernel,
        constants,
        types,
        registers,
        4096,
        warps,
        unaligned=unaligned,
        options={"enable_fp_fusion": False},
    )


def _project(name: str, size: str, kind: str, registers: int, shared: int, **changes: object) -> Variant:
    block_m, block_n, block_k, warps, stages = control.GEMM_LAUNCHES[size]
    constants = {
        "CHANNELS": 1024,
        "CONV": False,
        "RAGGED": False,
        "CONDITIONED": True,
        "ONE_IMAGE": True,
        "SCATTER": True,
        "PDL": False,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    } | changes
    read = ("x_ptr", "weight_ptr", "bias_ptr", "norm_weight_ptr", "norm_bias_ptr")
    types = dict.fromkeys((*read, "out_ptr"), f"*{kind}")
    types |= {"condition_ptr": "*fp32", "rows_ptr": "*i64"}
    types["cu_seqlens_ptr"] = "*i32" if constants["RAGGED"] else "constexpr"
    return Variant(
        f"project {name}",
        control.project_kernel,
        constants,
        types,
        registers,
        shared,
        warps,
        stages,
        unaligned=(
            "tokens",
            "per_image",
            "images",
            "steps",
            "cells_across",
            "stride_x_channel",
            "stride_x_height",
            "stride_x_width",
            "stride_condition_image",
            "stride_cu_seqlens",
            "stride_rows_token",
            "out_rows",
        ),
        tensor_cores=kind != "fp32",
    )


def _condition(name: str, size: str, kind: str, registers: int) -> Variant:
    images, block_n, block_k, warps = triton_condition.CONDITION_LAUNCHES[size]
    constants = {"PDL": False, "BLOCK_IMAGES": images, "BLOCK_N": block_n, "BLOCK_K": block_k}
    types = dict.fromkeys(("control_ptr", "norm_weight_ptr", "norm_bias_ptr", "weight_ptr", "bias_ptr"), f"*{kind}")
    types |= dict.fromkeys(("score_weight_ptr", "score_bias_ptr", "out_ptr"), "*fp32")
    return Variant(
        f"condition {name}",
        triton_condition.condition_kernel,
        constants,
        types,
        registers,
        4096,
        warps,
        unaligned=("images", "score_rows", "stride_out_image"),
    )


def _identity(name: str, size: str, kind: str, width: int, registers: int, **changes: object) -> Variant:
    block_m, warps = control.IDENTITY_LAUNCHES[size]
    constants = {
        "RAGGED": True,
        "CONDITIONED": True,
        "SCATTER": True,
        "PDL": False,
        "BLOCK_M": block_m,
        "BLOCK_H": width,
    } | changes
    types = dict.fromkeys(("x_ptr", "out_ptr"), f"*{kind}")
    types |= {"condition_ptr": "*fp32", "cu_seqlens_ptr": "*i64", "rows_ptr": "*i64"}
    return Variant(
        f"identity {name}",
        control.identity_kernel,
        constants,
        types,
        registers,
        64,
        warps,
        unaligned=("tokens", "per_image", "images", "steps", "stride_cu_seqlens", "stride_rows_token", "out_rows"),
    )


VARIANTS = (
    # Bytes in flight hide the latency of memory. Up to 64 registers a multiprocessor holds 32 warps, each with a
    # token's rows under way; float32 rows and the integer arithmetic of float8 need more, 24 warps must fit (80).
    _append("few bf16", append.LAUNCHES["few tokens"], "bf16", 64),
    _append("middle bf16", append.LAUNCHES["some tokens"], "bf16", 64),
    _append("many bf16", append.LAUNCHES["many tokens"], "bf16", 64),
    _append("many fp32 paged", append.LAUNCHES["many tokens"], "fp32", 80, PAGED=True),
    _append(
        "many fp16 float8", append.LAUNCHES["many tokens"], "fp16", 80, PAGED=True, FLOAT8=True, K_HEAD_SCALES=True
    ),
    _append(
        "partial interleaved",
        append.LAUNCHES["many tokens"],
        "bf16",
        64,
        HALF=16,
        SECTION_T=4,
        SECTION_H=6,
        SECTION_W=6,
        INTERLEAVED=True,
        HEAD_DIM=80,
        BLOCK_HALF=16,
        BLOCK_REST=64,
    ),
    # Both halves of a head wait for its root; of one warp a program, 24 still fit a multiprocessor's registers.
    _append("few bf16 normed", append.LAUNCHES["few tokens"], "bf16", 72, normed=True),
    _append("many bf16 normed", append.LAUNCHES["many tokens"], "bf16", 80, normed=True),
    # Accumulator and the tile being normalised live in registers. One image: two blocks of 4 warps a multiprocessor
    # (192), so that one computes while the other waits. Many images gather u per row, conv gathers channels: 64-bit
    # addresses of a whole tile, all the registers there are, without a spill. Shared memory: W and x, num_stages deep.
    _project("few bf16", "few tokens", "bf16", 192, 50 << 10),
    _project("few fp16 ragged", "few tokens", "fp16", 255, 50 << 10, RAGGED=True, ONE_IMAGE=False),
    _project("many bf16", "many tokens", "bf16", 192, 97 << 10),
    _project("bf16 conv", "short steps", "bf16", 255, 34 << 10, CONV=True, CHANNELS=256),
    # 64×64 float32 accumulators and both operands of an outer product in 256 threads.
    _project("fp32", "short steps", "fp32", 255, 34 << 10),
    _project("fp32 conv", "short steps", "fp32", 255, 34 << 10, CONV=True, CHANNELS=256, ONE_IMAGE=False),
    _project("plain", "few tokens", "bf16", 168, 50 << 10, CONDITIONED=False, SCATTER=False),
    # A stream of weights: 80 registers leave 24 warps a multiprocessor. Shared memory only for the sums' exchange.
    _condition("one bf16", "one image", "bf16", 80),
    _condition("images bf16", "images", "bf16", 80),
    _condition("one fp32", "one image", "fp32", 80),
    # A row in registers: 4,096 numbers in 512 threads are 8 each, 16,384 are 32, twice with k.
    _identity("narrow bf16", "narrow", "bf16", 2048, 64),
    _identity("wide bf16", "wide", "bf16", 4096, 64),
    _identity("widest fp32", "wide", "fp32", 16384, 168),
    _identity("plain", "wide", "fp16", 4096, 32, CONDITIONED=False),
)
