"""The re-encoders DINOv2 and SAM: uint8 images and boxes in, the features that the conditioned projector reads out.

The parts of the blocks are transformers' own modules under their own parameter names, but for SAM's attention; sums and
the norms behind them are `vpt_model.network.fused`'s. What stands before the blocks there, the image processor and the
patch convolution, is one `roi_patch_embed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _every

from vpt_kernels import (
    PackedWeight,
    RegionPolicy,
    dinov2_policy,
    fold_patch_weight,
    pack_weight,
    plan_regions,
    roi_patch_embed,
    sam_policy,
)
from vpt_model.checkpoint.encoder_names import state_for
from vpt_model.checkpoint.weights import release
from vpt_model.config import DinoConfig, ModelConfig, SamConfig
from vpt_model.network import fused
from vpt_model.network.linear import linear
from vpt_model.network.sam_attention import SamAttention

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Channel mean and standard deviation of both encoders' images (ImageNet's, RGB in 0..1)."""

_DINO_CROP = 224
# The longest edges to which the authors' data pipeline reduces an image first, whatever it does to the others.
_DINO_LONGEST_EDGE, _SAM_LONGEST_EDGE = 512, 1024


def build_encoder(kind: str, config: ModelConfig) -> DinoEncoder | SamEncoder:
    """Return the re-encoder of `kind` ("detection" or "seg") with the shapes in `config`; its parameters are still to
    `load`.

    The names and shapes of its `state_dict()` are those of the installed transformers' `Dinov2Model` or
    `SamVisionEncoder`. Raises ValueError for any other kind ("clip" re-encodes by the model's own vision tower) and
    without transformers.
    """
    if kind not in ("detection", "seg"):
        raise ValueError(f"kind is {kind!r}; only 'detection' (DINOv2) and 'seg' (SAM) have an encoder of their own")
    try:
        return DinoEncoder(config.dino) if kind == "detection" else SamEncoder(config.sam)
    except ImportError as error:
        raise ValueError(
            "the re-encoders DINOv2 and SAM come from transformers: pip install 'vpt-kernels[encoders]'"
        ) from error


class _Encoder(nn.Module):
    """Either re-encoder. Parameters are on the meta device until `load`.

    tokens: of one image behind the projector. grid: (height, width) in patches of one image. policy: how an image
    becomes patches.
    """

    tokens: int
    policy: RegionPolicy

    def __init__(self, patch_size: int, patches: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = (patches, patches)

    def load(self, state: dict[str, Tensor], packed: str | None = None, consume: bool = False) -> None:
        """Take the tensors of `state` as parameters, without a copy, and fold the patch embedding.

        state: every tensor under the checkpoint's name or transformers', all of one dtype and device. packed: the
        precision in which linear layers' weights are packed; all others are float32 then. consume: empty `state`, so
        that no more than one weight is in memory twice while they are packed. Raises ValueError naming those that are
        missing, unexpected or misshapen.
        """
        for module in self.modules():
            if isinstance(module, _Linear):
                module.unpack()
        try:
            self.load_state_dict(state_for(self, state), strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{error}: give exactly the tensors of {type(self).__name__}") from error
        if consume:
            state.clear()
        self.requires_grad_(False).eval()
        if packed is not None:
            for module in self.modules():
                if isinstance(module, _Linear):
                    module.pack(packed)
            self.float()
        convolution = self._convolution
        self._patch_embed = fold_patch_weight(convolution.weight, MEAN, STD, convolution.bias)

    def embed_regions(self, images: Sequence[Tensor], boxes: Sequence[tuple[int, int, int, int, int]]) -> Tensor:
        """Crop, resize, window and embed: patch embeddings `[len(boxes) * patches, D]`, positions not yet added.

        images: uint8 [height, width, 3] on the weights' device. boxes: (image, left, top, right, bottom) in pixels,
        right and bottom exclusive. Raises ValueError for a box outside its image.
        """
        plan = plan_regions([(image.shape[0], image.shape[1]) for image in images], boxes, self.policy)
        return roi_patch_embed(images, plan, self._patch_embed)

    def embed_pixel_values(self, pixel_values: Tensor) -> Tensor:
        """Patch embeddings `[n * patches, D]` of normalised pixels float `[n, 3, h, w]` of transformers' processor."""
        convolution = self._convolution
        pixels = pixel_values.to(convolution.weight)
        patches = F.conv2d(pixels, convolution.weight, convolution.bias, stride=self.patch_size)
        return patches.flatten(2).transpose(1, 2).flatten(0, 1)

    def _through(self, layers: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what x [n, ..., D] is behind the layers, as two summands: the second is still to be added, if any."""
        delta: Tensor | None = None
        for layer in layers:
            if _is_watched(layer):
                x, delta = layer(x if delta is None else x + delta), None
            else:
                x, delta = self._block(layer, x, delta)
        return x, delta

    def _block(self, layer: Any, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Do what the layer does with x + delta, and leave its last sum to whoever reads it next."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Channels of a patch embedding."""
        return self._convolution.out_channels

    @property
    def dtype(self) -> torch.dtype:
        return self._convolution.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._convolution.weight.device

    @property
    def _convolution(self) -> nn.Conv2d:
        raise NotImplementedError


class DinoEncoder(_Encoder):
    """DINOv2 on the central 224x224 pixels of an image whose shorter edge is 256; Dinov2Model in transformers."""

    def __init__(self, config: DinoConfig) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__(config.patch_size, _DINO_CROP // config.patch_size)
        self.policy = dinov2_policy(crop=_DINO_CROP, longest_edge=_DINO_LONGEST_EDGE)
        self.tokens = self.grid[0] * self.grid[1]
        with torch.device("meta"):
            whole = Dinov2Model(Dinov2Config(**vars(config)))
            self.embeddings, self.encoder, self.layernorm = whole.embeddings, whole.encoder, whole.layernorm
            _use_fast_linear(self)

    def load(self, state: dict[str, Tensor], packed: str | None = None, consume: bool = False) -> None:
        super().load(state, packed, consume)
        # The grid never changes, so the positions are interpolated once, by transformers' own function.
        sequence = self.embeddings.position_embeddings.new_empty(1, 1 + self.tokens, 1)
        sequence = sequence.expand(-1, -1, self.embeddings.position_embeddings.shape[2])
        positions = self.embeddings.interpolate_pos_encoding(sequence, _DINO_CROP, _DINO_CROP)
        self._first = self.embeddings.cls_token + positions[:, :1]
        self._positions = positions[:, 1:]

    def forward(self, patch_embeds: Tensor) -> Tensor:
        """Patch embeddings `[n * patches, D]` → `[n, patches, D]` behind the final norm, row-major, no class token."""
        x = patch_embeds.unflatten(0, (-1, self.tokens)) + self._positions
        x = torch.cat([self._first.expand(len(x), -1, -1), x], dim=1)
        x, delta = self._through(self.encoder.layer, x)
        return _add_norm(x, delta, self.layernorm)[1][:, 1:]

    def _block(self, layer: Any, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        x, normed = _add_norm(x, delta, layer.norm1)
        attended = layer.attention(normed)
        # From transformers 5.24 on its weights come with it.
        attended = attended[0] if isinstance(attended, tuple) else attended
        x, normed = _add_norm(x, layer.layer_scale1(attended), layer.norm2)
        return x, layer.layer_scale2(layer.mlp(normed))

    @property
    def _convolution(self) -> nn.Conv2d:
        return self.embeddings.patch_embeddings.projection


class SamEncoder(_Encoder):
    """SAM's image encoder on an image whose longer edge is 1024, zero-padded; SamVisionEncoder in transformers."""

    def __init__(self, config: SamConfig) -> None:
        from transformers import SamVisionConfig
        from transformers.models.sam.modeling_sam import SamVisionEncoder

        super().__init__(config.patch_size, config.image_size // config.patch_size)
        self.policy = sam_policy(edge=config.image_size, longest_edge=_SAM_LONGEST_EDGE)
        # The projector's convolution makes one token of 4x4 patches.
        self.tokens = (self.grid[0] // 4) * (self.grid[1] // 4)
        with torch.device("meta"):
            whole = SamVisionEncoder(SamVisionConfig(**vars(config), attn_implementation="sdpa"))
            self.patch_embed, self.pos_embed = whole.patch_embed, whole.pos_embed
            self.layers, self.neck = whole.layers, whole.neck
            for layer in self.layers:
                layer.attn = SamAttention(layer.attn)
            _use_fast_linear(self)

    def load(self, state: dict[str, Tensor], packed: str | None = None, consume: bool = False) -> None:
        super().load(state, packed, consume)
        for layer in self.layers:
            layer.attn.prepare()

    def forward(self, patch_embeds: Tensor) -> Tensor:
        """Patch embeddings `[n * patches, D]` → `[n, C, h, w]` behind the neck, h and w in patches."""
        x = patch_embeds.unflatten(0, (-1, *self.grid)) + self.pos_embed
        x, delta = self._through(self.layers, x)
        with ieee_convolutions():
            return self.neck(x if delta is None else x + delta)

    def _block(self, layer: Any, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        x, normed = _add_norm(x, delta, layer.layer_norm1)
        x, normed = _add_norm(x, self._attend(layer, normed), layer.layer_norm2)
        return x, layer.mlp(normed)

    def _attend(self, layer: Any, x: Tensor) -> Tensor:
        """Return the attention of [n, h, w, D], within windows where the layer has them."""
        if not layer.window_size:
            return layer.attn(x)[0]
        windows, padded = layer.window_partition(x, layer.window_size)
        return layer.window_unpartition(layer.attn(windows)[0], layer.window_size, padded, self.grid)

    @property
    def _convolution(self) -> nn.Conv2d:
        return self.patch_embed.projection


def _is_watched(part: nn.Module) -> bool:
    """Return whether calling the part does more than its class wrote: it has hooks, as all modules may, or a forward of
    its own.
    """
    hooks = part._forward_hooks or part._forward_pre_hooks or _every._global_forward_hooks
    return bool(hooks or _every._global_forward_pre_hooks) or "forward" in vars(part)


def _add_norm(x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x + delta [..., D], or x without a delta, and its LayerNorm."""
    if type(norm) is not nn.LayerNorm or _is_watched(norm):
        total = x if delta is None else x + delta
        return total, norm(total)
    rows = None if delta is None else delta.flatten(0, -2)
    total, normed = fused.add_layer_norm(x.flatten(0, -2), rows, norm.weight, norm.bias, norm.eps)
    return total.view_as(x), normed.view_as(x)


@contextmanager
def ieee_convolutions() -> Iterator[None]:
    """Multiply float32 as float32 in cuDNN inside: by default it takes TF32, whose ten bits are those of float16."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


class _Linear(nn.Linear):
    packed: PackedWeight | None = None

    def pack(self, precision: str) -> None:
        """Keep the weight packed, and only so."""
        self.packed = pack_weight(self.weight, precision)
        release(self.weight)
        self.register_parameter("weight", None)

    def unpack(self) -> None:
        """Have a place for a weight again, to be loaded."""
        if self.packed is not None:
            self.packed = None
            place = torch.empty(self.out_features, self.in_features, dtype=torch.float32, device="meta")
            self.weight = nn.Parameter(place)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.packed is None else self.packed
        return linear(x.flatten(0, -2), weight, self.bias).view(*x.shape[:-1], self.out_features)


def _use_fast_linear(module: nn.Module) -> None:
    """Put `vpt_model.network.linear` into every linear layer of `module`, whose parameters have no values yet."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, _Linear(child.in_features, child.out_features, child.bias is not None))
