"""SAM's attention with its relative positions as further channels of query and key.

With q′ = [q, q·R_row, q·R_column] and k′ = [k, one-hot(row), one-hot(column)], q′·k′ is the biased score, exactly, and
plain fused attention takes it: no bias of every query and key exists, which is 1 GB for one image of sam-vit-large.
That is for GPUs, where it has not run yet; a CPU takes the bias. The tables are made once: nothing waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SamAttention(nn.Module):
    """Takes the place of transformers' SamVisionAttention, with its parameters under its names."""

    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter
    qkv: nn.Linear
    proj: nn.Linear
    heads: int

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = attention.num_attention_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def prepare(self) -> None:
        """Build the loaded parameters' tables: `_rows`, `_columns` [S, S, D], `_places` [S · S, 2 · S and zeros]."""
        side, dim = (len(self.rel_pos_h) + 1) // 2, self.rel_pos_h.shape[1]
        place = torch.arange(side, device=self.rel_pos_h.device)
        distance = place[:, None] - place + side - 1
        self._rows, self._columns = self.rel_pos_h[distance], self.rel_pos_w[distance]
        # Fused attention on a GPU wants a multiple of eight channels.
        spare = -(dim + 2 * side) % 8
        row, column = place.repeat_interleave(side), place.repeat(side)
        one_hot = torch.cat([F.one_hot(row, side), F.one_hot(column, side)], dim=1)
        self._places = F.pad(one_hot, (0, spare)).to(self.rel_pos_h.dtype)
        # On a CPU the further channels cost as much time as the bias in a window, and more in the whole image.
        self._augments = self.rel_pos_h.device.type != "cpu"

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        """Map [n, S, S, C] to [n, S, S, C]; None stands for the weights, which nobody computes."""
        images, height, width, _ = hidden_states.shape
        packed = self.qkv(hidden_states).view(images, height * width, 3, self.heads, -1)
        q, k, v = packed.permute(2, 0, 3, 1, 4).contiguous()  # [n, heads, S · S, D]
        dim, grid = q.shape[-1], q.unflatten(2, (height, width))
        rows = torch.einsum("nahwd,hkd->nahwk", grid, self._rows)
        columns = torch.einsum("nahwd,wkd->nahwk", grid, self._columns)
        if self._augments:
            bias = torch.cat([rows, columns], dim=-1).flatten(2, 3) * dim**0.5
            extra = self._places.shape[1]
            q = torch.cat([q, F.pad(bias, (0, extra - bias.shape[-1]))], dim=-1)
            k = torch.cat([k, self._places.expand(images, self.heads, -1, -1)], dim=-1)
            out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, extra)), scale=dim**-0.5)[..., :dim]
        else:
            bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(images, height, width, -1)), None
