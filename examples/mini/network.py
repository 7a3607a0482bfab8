"""vpt-mini's forward pass for training: plain PyTorch over the state dict that `vpt_model` serves.

`vpt_model` runs forward only, on caches and fused kernels. These functions compute the same from the same tensors,
differentiably and in batches of equal shapes; `tests/model/test_mini_training.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_kernels import rotary_table
from vpt_model.config import ModelConfig
from vpt_model.network.positions import vision_positions
from vpt_model.network.vision import MEAN, STD

State = Mapping[str, Tensor]
GAZE = 2
"""The language model's layer, counted from 0, of which training says where its first heads should look."""


class Network:
    """The parts of one model for images of one size: `grid` is (height, width) in patches of every look."""

    def __init__(self, config: ModelConfig, grid: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.config = config
        vision = config.vision
        pixels = vision.patch_size**2
        self.mean, self.std = (torch.tensor(values).repeat(pixels).to(device) * 255 for values in (MEAN, STD))
        quarter = vision.head_dim // 4
        frequencies = 1.0 / 10000.0 ** (torch.arange(quarter) / quarter)
        angles = vision_positions([grid], vision.spatial_merge_size)[:, :, None] * frequencies
        self.vision_angles = tuple(f(angles.flatten(1))[None, None].to(device) for f in (torch.cos, torch.sin))
        table = rotary_table(config.max_position_embeddings, config.head_dim, config.rope_theta, device)
        self.table = table.unflatten(1, (2, -1))
        self.axes = torch.repeat_interleave(torch.arange(3), torch.tensor(config.mrope_section)).to(device)

    def see(self, state: State, patches: Tensor) -> Tensor:
        """Features [B, N / 4, H] of uint8 patches [B, N, 588], bytes in (y, x, channel) order."""
        config = self.config.vision
        weight = state["visual.patch_embed.proj.weight"].sum(2).permute(0, 2, 3, 1).flatten(1)
        x = F.linear((patches.to(weight.dtype) - self.mean) / self.std, weight)
        for index in range(config.depth):
            block = f"visual.blocks.{index}."
            y = _linear(state, f"{block}attn.qkv", _layer_norm(state, f"{block}norm1", x))
            q, k, v = y.unflatten(2, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = (_rotate(part, *self.vision_angles) for part in (q, k))
            y = _attend(q, k, v).transpose(1, 2).flatten(2)
            x = x + _linear(state, f"{block}attn.proj", y)
            y = _linear(state, f"{block}mlp.fc1", _layer_norm(state, f"{block}norm2", x))
            x = x + _linear(state, f"{block}mlp.fc2", y * torch.sigmoid(1.702 * y))
        merged = _layer_norm(state, "visual.merger.ln_q", x).flatten(1).unflatten(1, (-1, 4 * config.embed_dim))
        return _linear(state, "visual.merger.mlp.2", F.gelu(_linear(state, "visual.merger.mlp.0", merged)))

    def read(
        self, state: State, embeds: Tensor, positions: Tensor, asked: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, H] behind the final norm; positions int64 [B, 3, T]. Padding belongs at the end.

        asked: rows and columns int64 [n] of tokens whose attention in layer GAZE is wanted too, as log-probabilities
        [n, heads of the first KV head, T].
        """
        config = self.config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        # [B, T, 2, D/2] from the three axes' positions: each pair of channels rotates by one of them.
        at = positions[:, self.axes].transpose(1, 2)
        pairs = torch.arange(dim // 2, device=at.device)
        causal = torch.full((at.shape[1],) * 2, float("-inf"), dtype=embeds.dtype, device=at.device).triu_(1)
        cos, sin = (self.table[at, part, pairs][:, None] for part in (0, 1))
        x, gaze = embeds, None
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}."
            y = self._norm(state, f"{layer}input_layernorm", x)
            q, k, v = (_linear(state, f"{layer}self_attn.{name}_proj", y) for name in "qkv")
            q, k, v = (part.unflatten(2, (-1, dim)).transpose(1, 2) for part in (q, k, v))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if asked is not None and index == GAZE:
                rows, columns = asked
                scores = q[rows, : heads // kv_heads, columns] @ k[rows, 0].transpose(-1, -2) * dim**-0.5
                gaze = (scores.float() + causal[columns][:, None]).log_softmax(-1)
            k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
            y = _attend(q, k, v, causal).transpose(1, 2).flatten(2)
            x = x + F.linear(y, state[f"{layer}self_attn.o_proj.weight"])
            y = self._norm(state, f"{layer}post_attention_layernorm", x)
            gate, up = (F.linear(y, state[f"{layer}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, state[f"{layer}mlp.down_proj.weight"])
        return self._norm(state, "model.norm", x), gaze

    def reencode(self, state: State, features: Tensor, control: Tensor) -> Tensor:
        """Features [B, M, H] under the control states [B, H]: out = f + (f·k)k."""
        normed = F.layer_norm(
            control,
            control.shape[-1:],
            state["clip_projector.layernorm_condition.weight"],
            state["clip_projector.layernorm_condition.bias"],
            eps=1e-5,
        )
        k = _linear(state, "clip_projector.linear_condition", normed)[:, None]
        return features + (features * k).sum(-1, keepdim=True) * k

    def logits(self, state: State, hidden: Tensor) -> Tensor:
        return F.linear(hidden, state["lm_head.weight"]).float()

    def _norm(self, state: State, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps) * state[f"{name}.weight"]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    # On the CPU the backward of scaled_dot_product_attention takes five times as long as these three products.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores if mask is None else scores + mask).softmax(-1).to(v.dtype) @ v
