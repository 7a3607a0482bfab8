"""One compilation of a Triton kernel as it is launched, and what it may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

TARGETS = (80, 90, 100, 120)
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


@dataclass(frozen=True)
class Variant:
    """One compilation; nothing may spill on any target unless `spilled` allows it, with the reason beside it.

    Attributes:
        constants: the constexpr arguments; `tuned` names those that a launch table chooses.
        types: of arguments that are not int32; "constexpr" for None.
        registers, shared: limits per thread and, in bytes, per block, on every target; see also `tests.aot.budgets`.
        unaligned: arguments not known to be multiples of 16.
        tensor_cores: its PTX must hold the target's matrix instruction; else it must hold none.
        batched: besides, it multiplies batches of matrices, which takes mma.sync on every target.
        streams: its PTX must load global memory by 16 bytes a thread, into registers or into shared memory.
        multiplies: it multiplies float32 matrices on the ordinary cores, by fused instructions as it should, so that
            none of them says anything about its other sums; its 16-bit twin does.
        spilled: bytes stored and loaded by spills that are accepted, per thread.
    """

    name: str
    kernel: object
    constants: dict[str, object]
    types: dict[str, str]
    registers: int
    shared: int
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()
    tensor_cores: bool = False
    batched: bool = False
    streams: bool = False
    multiplies: bool = False
    spilled: int = 0
    tuned: tuple[str, ...] = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_TOKENS", "BLOCK_HEADS", "BLOCK_IMAGES")
    options: dict[str, object] = field(default_factory=lambda: {"enable_fp_fusion": True})
