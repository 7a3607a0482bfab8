"""What a version of Triton costs beyond the limits of `tests.aot.variants`, which hold on 3.6: per version, with why.

The versions schedule and assemble the same kernel differently. The launches are chosen so that none spills on any of
them, but for what stands here and for the strip kernel.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.aot.variant import Variant


class Budget(NamedTuple):
    """Limits in the place of a variant's own; None leaves that one."""

    reason: str
    registers: int | None = None
    shared: int | None = None
    spilled: int | None = None


_ONE_WARP = "sm_100: blocks of one warp are bounded by their number, 32 a multiprocessor, not by registers"
_FLOAT32 = "float32 rows: 16 warps share a multiprocessor instead of 24, each with twice the bytes in flight"
_ONE_BLOCK = "one block of 8 warps a multiprocessor instead of two: nothing spills, and 16 warps would not hide more"
_COPIED = "sm_90: the weight's tile lies once more beside the pipeline; two blocks still share a multiprocessor"
_STRIP = "sm_80: as on the others, the prologue's addresses leave registers, some more of them"
_SCALARS = "sm_120: ptxas stops at 80 registers, where three blocks share a multiprocessor, and puts six scalars by"
_WIDE = "fewer blocks a multiprocessor than on 3.6; nothing spills"
_PUT_BY = "two to five registers are put by at the bound that ptxas chose; the other versions do without"
_KEYS = "sm_80: a block of float32 keys does not fit beside its scores from 3.8 on; 16-bit caches do not spill"

BUDGETS: dict[str, dict[str, Budget]] = {
    "3.6": {
        "append few bf16 normed": Budget(_ONE_WARP, registers=68),
    },
    "3.7": {
        "append many fp32 paged": Budget(_FLOAT32, registers=100),
        "project many bf16": Budget(f"sm_120: {_ONE_BLOCK}", registers=255),
        "norm swiglu one bf16": Budget(f"sm_120: {_WIDE}", registers=150),
        "norm swiglu one fp32": Budget(f"sm_80: {_WIDE}", registers=137),
        "head one bf16": Budget(f"sm_90: {_PUT_BY}", registers=72, spilled=8),
        "head one fp32": Budget(f"sm_90, sm_120: {_WIDE}", registers=91),
        "head rows bf16": Budget(f"sm_90: {_PUT_BY}", spilled=8),
        "head rows fp16": Budget(f"sm_90: {_PUT_BY}", spilled=8),
        "decode attention bf16": Budget(f"sm_120: {_PUT_BY}", spilled=18),
    },
    "3.8": {
        "decode attention fp32": Budget(_KEYS, registers=255, spilled=408),
        "append many fp32 paged": Budget(_FLOAT32, registers=100),
        "project few bf16": Budget(_COPIED, shared=57 << 10),
        "project few fp16 ragged": Budget(_COPIED, shared=57 << 10),
        "project plain": Budget(_COPIED, shared=57 << 10),
        "project many bf16": Budget(f"sm_120: {_ONE_BLOCK}; {_COPIED}", registers=255, shared=113 << 10),
        "project fp32": Budget(_SCALARS, spilled=24),
        "strip bf16": Budget(_STRIP, spilled=680),
        "strip fp32": Budget(_STRIP, spilled=680),
    },
    "3.9": {
        "decode attention fp32": Budget(_KEYS, registers=255, spilled=448),
        "append many fp32 paged": Budget(_FLOAT32, registers=100),
        "project many bf16": Budget(f"sm_90: {_ONE_BLOCK}", registers=216),
    },
}
"""Triton's minor version → variant → its limits there. A version that is not listed has those of the newest one."""


def limits(version: str, variant: Variant) -> tuple[int, int, int]:
    """Registers, shared bytes and spilled bytes that `variant` may take under this version of Triton."""
    minor = ".".join(version.split(".")[:2])
    newest = max(BUDGETS, key=lambda known: tuple(map(int, known.split("."))))
    budget = BUDGETS.get(minor, BUDGETS[newest]).get(variant.name)
    return tuple(
        own if budget is None or getattr(budget, name) is None else getattr(budget, name)
        for name, own in (("registers", variant.registers), ("shared", variant.shared), ("spilled", variant.spilled))
    )
