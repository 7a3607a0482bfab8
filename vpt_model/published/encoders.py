"""Images, encoders and projectors of the published VPT procedure, written literally; see `procedure`.

The image processors are Pillow and NumPy, the re-encoders transformers' whole `Dinov2Model` and `SamVisionEncoder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vpt_model.checkpoint.encoder_names import state_for
from vpt_model.config import ModelConfig, VisionConfig

Grid = tuple[int, int]
Pixels = npt.NDArray[np.float32]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIN_PIXELS, MAX_PIXELS = 3136, 12845056


def first_resize(image: Image.Image, longest_edge: int) -> Image.Image:
    """Return the authors' step before the processor: NEAREST to `longest_edge`, RGB, at least 28 px, aspect at most
    200.
    """
    if max(image.size) > longest_edge:
        factor = longest_edge / max(image.size)
        image = image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.NEAREST)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if min(image.size) < 28:
        image = image.resize((max(image.width, 28), max(image.height, 28)), Image.Resampling.NEAREST)
    if image.width / image.height > 200:
        image = image.resize((image.height * 180, image.height), Image.Resampling.NEAREST)
    if image.height / image.width > 200:
        image = image.resize((image.width, image.width * 180), Image.Resampling.NEAREST)
    return image


def smart_resize(height: int, width: int, factor: int) -> tuple[int, int]:
    """Return the sides by transformers' Qwen2-VL rule: multiples of `factor`, the area kept within the pixel limits."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        h, w = math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    elif h * w < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def process_images(images: Sequence[Image.Image], vision: VisionConfig) -> tuple[Tensor, list[Grid]]:
    """Do what transformers' Qwen2-VL image processor does: float32 pixel values [Σ patches, 3·T·p·p] and one (h, w) per
    image.
    """
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, grids = [], []
    for image in images:
        height, width = smart_resize(image.height, image.width, p * m)
        # Two calls pin the pass order of Pillow ≤ 12.0 (horizontal first), which newer versions choose by shape.
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        scaled: Pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)
        pixels = np.divide(scaled - np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32))
        frames = np.tile(pixels.transpose(2, 0, 1)[None], (t, 1, 1, 1))
        h, w = height // p, width // p
        patches = frames.reshape(t, 3, h // m, m, p, w // m, m, p).transpose(2, 5, 3, 6, 1, 0, 4, 7)
        rows.append(torch.from_numpy(patches.reshape(h * w, 3 * t * p * p)))
        grids.append((h, w))
    return torch.cat(rows), grids


def frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Weights:
    """The tensors of a state dict below one prefix, and transformers' layers on them."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[name + ".weight"], self.tensors.get(name + ".bias"))

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[name + ".weight"], self.tensors[name + ".bias"], eps)

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        return self.tensors[name + ".weight"] * y.to(x.dtype)


class VisionTower:
    """Qwen2-VL's `visual`: patch embeddings [N, E] of whole images and their grids → merged tokens [N/4, H]."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

    def embed(self, pixel_values: Tensor) -> Tensor:
        # The Conv3d's stride is its kernel: the same product as one GEMM, which is how a CPU does it fastest.
        weight = self.weights.tensors["patch_embed.proj.weight"]
        return F.linear(pixel_values.to(weight), weight.flatten(1))

    def __call__(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        w, lengths = self.weights, [h * w for h, w in grids]
        cos, sin = torch.cat([self.rotary(*grid) for grid in grids], dim=1).to(x.device)[:, :, None]
        for block in (f"blocks.{layer}." for layer in range(self.config.depth)):
            y = w.layer_norm(x, block + "norm1", 1e-6)
            q, k, v = w.linear(y, block + "attn.qkv").view(len(x), 3, self.config.num_heads, -1).unbind(1)
            q, k = (rotate(y.float(), cos, sin).to(x.dtype) for y in (q, k))
            images = zip(*(y.transpose(0, 1)[None].split(lengths, dim=2) for y in (q, k, v)), strict=True)
            y = torch.cat([F.scaled_dot_product_attention(*image) for image in images], dim=2)
            x = x + w.linear(y[0].transpose(0, 1).reshape(x.shape), block + "attn.proj")
            y = w.linear(w.layer_norm(x, block + "norm2", 1e-6), block + "mlp.fc1")
            x = x + w.linear(y * torch.sigmoid(1.702 * y), block + "mlp.fc2")
        x = w.layer_norm(x, "merger.ln_q", 1e-6).view(-1, self.config.spatial_merge_size**2 * self.config.embed_dim)
        return w.linear(F.gelu(w.linear(x, "merger.mlp.0")), "merger.mlp.2")

    def rotary(self, h: int, w: int) -> Tensor:
        m = self.config.spatial_merge_size
        cells = torch.cartesian_prod(torch.arange(h, device="cpu"), torch.arange(w, device="cpu")).T
        cells = cells.view(2, h // m, m, w // m, m).permute(1, 3, 2, 4, 0).reshape(h * w, 2)
        angles = (cells[..., None] * frequencies(10000.0, self.config.head_dim // 2)).flatten(1).repeat(1, 2)
        return torch.stack((angles.cos(), angles.sin()))


class Reencoder:
    """DINOv2 or SAM as the published code runs them: a processor, an encoder and a fixed number of pads per image."""

    def __init__(
        self,
        longest_edge: int,
        patch_size: int,
        tokens: int,
        process: Callable[[Image.Image], Tensor],
        module: nn.Module,
    ) -> None:
        self.longest_edge, self.patch_size, self.tokens = longest_edge, patch_size, tokens
        self.process, self.module = process, module

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the normalised pixels float32 [images, 3, height, width]."""
        return torch.stack([self.process(first_resize(image, self.longest_edge)) for image in images])

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Return DINOv2's [n, tokens, D] without the class token, or SAM's [n, C, h, w]."""
        weight = next(self.module.parameters())
        out = self.module(pixel_values.to(weight)).last_hidden_state
        return out if out.dim() == 4 else out[:, 1:]


def reencoder(config: ModelConfig, state: Mapping[str, Tensor]) -> Reencoder | None:
    """Return the re-encoder of the variant; None where the model's own vision tower re-encodes."""
    if config.kind not in ("detection", "seg"):
        return None
    from transformers import Dinov2Config, Dinov2Model, SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    with torch.device("meta"):
        if config.kind == "detection":
            module = Dinov2Model(Dinov2Config(**vars(config.dino)))
        else:
            module = SamVisionEncoder(SamVisionConfig(**vars(config.sam)))
    stored = Weights(state, f"{config.kind}_model.").tensors
    module.load_state_dict(state_for(module, stored), strict=True, assign=True)
    module.requires_grad_(False).eval()
    if config.kind == "detection":
        patch = config.dino.patch_size
        return Reencoder(512, patch, (224 // patch) ** 2, process_dino, module)
    edge, patch = config.sam.image_size, config.sam.patch_size
    return Reencoder(1024, patch, (edge // patch // 4) ** 2, lambda image: process_sam(image, edge), module)


def process_dino(image: Image.Image) -> Tensor:
    """Do what transformers' BitImageProcessor does for DINOv2: shorter edge 256, central 224x224, [3, 224, 224]."""
    short, long = min(image.size), int(256 * max(image.size) / min(image.size))
    width, height = (256, long) if image.width == short else (long, 256)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 224) // 2, (height - 224) // 2
    return normalised(image.crop((left, top, left + 224, top + 224)))


def process_sam(image: Image.Image, edge: int) -> Tensor:
    """Do what transformers' SamImageProcessor does: longer edge `edge`, zero padding at the right and bottom, [3, edge,
    edge].
    """
    scale = edge / max(image.size)
    width, height = int(image.width * scale + 0.5), int(image.height * scale + 0.5)
    image = image.resize((width, image.height), Image.Resampling.BILINEAR)
    pixels = normalised(image.resize((width, height), Image.Resampling.BILINEAR))
    return F.pad(pixels, (0, edge - width, 0, edge - height))


def normalised(image: Image.Image) -> Tensor:
    scaled: Pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)
    pixels = np.divide(scaled - np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32))
    return torch.from_numpy(pixels.transpose(2, 0, 1))


def project(kind: str | None, weights: Weights, features: Any, control: Tensor | None) -> Tensor:
    """Return the authors' Minimal{,Sam,CLIP}Projector: f + (f·k)k with one control state per image; without control f.

    features: DINOv2's [n, tokens, D], SAM's [n, C, h, w], or the vision tower's, one [tokens, H] for each image, which
    are padded to a batch. Returns the tokens of all images [tokens, H].
    """
    if kind == "detection":
        f = weights.linear(weights.layer_norm(features, "layernorm_feature", 1e-5), "linear_feature")
        lengths = [f.shape[1]] * len(f)
    elif kind == "seg":
        x = weights.layer_norm(features.permute(0, 2, 3, 1), "layernorm_feature", 1e-5).permute(0, 3, 1, 2)
        weight, bias = (weights.tensors[f"conv_feature.{name}"] for name in ("weight", "bias"))
        f = F.conv2d(x, weight, bias, stride=4).flatten(2).transpose(1, 2)
        lengths = [f.shape[1]] * len(f)
    else:
        f, lengths = nn.utils.rnn.pad_sequence(list(features), batch_first=True), [len(x) for x in features]
    if control is not None:
        k = weights.linear(weights.layer_norm(control, "layernorm_condition", 1e-5), "linear_condition")
        f = f + torch.einsum("bso,bo->bs", f, k)[..., None] * k[:, None]
    return torch.cat([row[:length] for row, length in zip(f, lengths, strict=True)])
