"""The layers by the names that `LayerRepository(layer_name=…)` looks for."""

from vpt_kernels.hub import (
    Dinov2PatchEmbed,
    MinimalCLIPProjector,
    MinimalProjector,
    MinimalSamProjector,
    QwenVLPatchEmbed,
    SamPatchEmbed,
)

__all__ = [
    "Dinov2PatchEmbed",
    "MinimalCLIPProjector",
    "MinimalProjector",
    "MinimalSamProjector",
    "QwenVLPatchEmbed",
    "SamPatchEmbed",
]
