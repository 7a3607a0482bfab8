"""What stands between a layer's products, as it is launched."""

from __future__ import annotations

from tests.aot.variant import Variant
from vpt_model.network.fused import gates, norms, rotary


def _norm(kernel: object, kind: str, registers: int, block: int, added: bool = True) -> Variant:
    name = kernel.__name__.removesuffix("_kernel").replace("_", " ")
    types = dict.fromkeys(("x", "weight", "bias", "out", "normed"), f"*{kind}") | {"eps": "fp32"}
    types["delta"] = f"*{kind}" if added else "constexpr"
    return Variant(
        f"{name} {kind} {block}" + (" alone" if not added else ""),
        kernel,
        {"BLOCK": block},
        types,
        registers,
        64,
        norms.WARPS,
        unaligned=("eps",),
        streams=True,
    )


def _gate(kernel: object, kind: str) -> Variant:
    # 8 values a thread: 64 registers leave 32 warps a multiprocessor.
    types = dict.fromkeys(("packed", "out", "x"), f"*{kind}")
    return Variant(
        f"{kernel.__name__.removesuffix('_kernel').replace('_', ' ')} {kind}",
        kernel,
        {"BLOCK": gates.BLOCK},
        types,
        64,
        0,
        gates.WARPS,
        streams=True,
    )


def _rotate(kind: str, heads: int, dim: int) -> Variant:
    constants = {"HEADS": heads, "HALF": dim // 2, "BLOCK_HEADS": rotary.BLOCK_HEADS, "BLOCK_HALF": 64}
    return Variant(
        f"rotate packed {kind}",
        rotary.rotate_packed_kernel,
        constants,
        {"packed": f"*{kind}", "cos": "*fp32", "sin": "*fp32"},
        64,
        256,
        rotary.WARPS,
        options={"enable_fp_fusion": False},
    )


VARIANTS = (
    # A row in the registers of 256 threads, 8 or 16 values each: 32 warps and more a multiprocessor.
    _norm(norms.add_rms_norm_kernel, "bf16", 64, 2048),
    _norm(norms.add_rms_norm_kernel, "bf16", 64, 4096, added=False),
    _norm(norms.add_rms_norm_kernel, "fp32", 64, 4096),
    _norm(norms.add_layer_norm_kernel, "bf16", 64, 2048),
    _norm(norms.add_layer_norm_kernel, "fp16", 64, 2048, added=False),
    _norm(norms.add_layer_norm_kernel, "fp32", 64, 2048),
    _gate(gates.silu_mul_kernel, "bf16"),
    _gate(gates.silu_mul_kernel, "fp32"),
    _gate(gates.quick_gelu_kernel, "bf16"),
    _gate(gates.quick_gelu_kernel, "fp32"),
    _rotate("bf16", 16, 80),
    _rotate("fp32", 16, 80),
)
