"""What stands between a layer's products, one launch each on a GPU with Triton: residual and norm, gates, rotation.

Everywhere else the same in PyTorch's operations, which `reference` holds. Written and interpreted on a CPU and compiled
for sm_80 to sm_120; not yet run on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from vpt_model.network.decode import on_gpu
from vpt_model.network.fused import reference


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta [M, H], or x without a delta, and its RMSNorm, rounded before the weight as in Qwen2-VL."""
    if not on_gpu(x):
        return reference.add_rms_norm(x, delta, weight, eps)
    from vpt_model.network.fused import norms

    return norms.add_rms_norm(x, delta, weight, eps)


def add_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta [M, H], or x itself without a delta, and its LayerNorm."""
    if not on_gpu(x):
        return reference.add_layer_norm(x, delta, weight, bias, eps)
    from vpt_model.network.fused import norms

    return norms.add_layer_norm(x, delta, weight, bias, eps)


def silu_mul(packed: Tensor) -> Tensor:
    """Return SiLU(gate) · up of packed gates and ups [M, 2 · I]: [M, I]."""
    if not on_gpu(packed):
        return reference.silu_mul(packed)
    from vpt_model.network.fused import gates

    return gates.silu_mul(packed)


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · sigmoid(1.702 · x) of [M, I]; on a GPU it is written over x."""
    if not on_gpu(x):
        return reference.quick_gelu(x)
    from vpt_model.network.fused import gates

    return gates.quick_gelu_(x)


def rotate_packed(packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of a packed projection [N, 3, heads, D], q and k rotated by half-split pairs; cos, sin [N, 1, D
    / 2].

    On a GPU the three are views of `packed`, rotated in place.
    """
    if not on_gpu(packed):
        return reference.rotate_packed(packed, cos, sin)
    from vpt_model.network.fused import rotary

    rotary.rotate_packed_(packed, cos, sin)
    q, k, v = packed.unbind(1)
    return q, k, v
