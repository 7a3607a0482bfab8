"""Shapes of the language model, the vision tower and the perception variant."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

KINDS = ("clip", "detection", "seg")


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision tower. `hidden_size` is the language model's width (the merger's output)."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    hidden_size: int = 1536

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class DinoConfig:
    """DINOv2, the re-encoder of kind "detection"; fields as in transformers' Dinov2Config. Defaults: dinov2-large."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    image_size: int = 518
    patch_size: int = 14
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class SamConfig:
    """SAM's image encoder, the re-encoder of kind "seg"; fields as in transformers' SamVisionConfig.

    Defaults: sam-vit-large.
    """

    hidden_size: int = 1024
    output_channels: int = 256
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_dim: int = 4096
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (5, 11, 17, 23)
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class ModelConfig:
    """One VPT model: a Qwen2-VL language model, its vision tower and the re-encoder `kind`.

    `kind` is the released variant's re-encoder: "clip" (the model's own tower), "detection" (DINOv2, shaped by
    `dino`), "seg" (SAM, shaped by `sam`), or None for a plain Qwen2-VL without perception tokens.
    """

    hidden_size: int = 1536
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    intermediate_size: int = 8960
    vocab_size: int = 151936
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    kind: str | None = "clip"
    vision: VisionConfig = field(default_factory=VisionConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    sam: SamConfig = field(default_factory=SamConfig)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS} or None")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim/2 = {self.head_dim // 2}")
        if self.vision.hidden_size != self.hidden_size:
            raise ValueError(f"vision.hidden_size {self.vision.hidden_size} must equal hidden_size {self.hidden_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


_2B = ModelConfig()
_7B = ModelConfig(
    hidden_size=3584,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
    tie_word_embeddings=False,
    vision=VisionConfig(hidden_size=3584),
)

PRESETS: dict[str, ModelConfig] = {
    # Seconds on any machine; the vocabulary is bytes plus the special and perception tokens.
    "tiny": ModelConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=320,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        mrope_section=(4, 6, 6),
        vision=VisionConfig(depth=2, embed_dim=64, num_heads=4, mlp_ratio=2, hidden_size=128),
        dino=DinoConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
        sam=SamConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=128, global_attn_indexes=(1,)
        ),
    ),
    # True widths and vocabulary of the 2B, two layers each: work is measured, not Python overhead.
    "2b-slice": replace(
        _2B,
        num_hidden_layers=2,
        vision=replace(_2B.vision, depth=2),
        dino=replace(_2B.dino, num_hidden_layers=2),
        sam=replace(_2B.sam, num_hidden_layers=2, global_attn_indexes=(1,)),
    ),
    "2b": _2B,
    "7b": _7B,
}
"""Named configurations; `2b` and `7b` are the true shapes of Qwen2-VL."""
