"""A stand-in of the published `VPT_Qwen2VLForConditionalGeneration` with the names and structure it has.

Written for these tests: transformers 4.45's attention (positions mixed inside it, one list of keys and one of values as
the cache), the authors' three projectors, their two passes of the language model over copies of the cache.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import normal

SECTIONS = [2, 3, 3]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
HIDDEN = HEADS * HEAD_DIM
ACTION_START, ACTION, PAD, IMAGE = 80, 81, 82, 90


class DynamicCache:
    def __init__(self) -> None:
        self._seen_tokens = 0
        self.key_cache: list[Tensor] = []
        self.value_cache: list[Tensor] = []

    def get_seq_length(self) -> int:
        return self.key_cache[0].shape[-2] if self.key_cache else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs=None):
        if layer_idx == 0:
            self._seen_tokens += key_states.shape[-2]
        if len(self.key_cache) <= layer_idx:
            self.key_cache.append(key_states)
            self.value_cache.append(value_states)
        else:
            self.key_cache[layer_idx] = torch.cat([self.key_cache[layer_idx], key_states], dim=-2)
            self.value_cache[layer_idx] = torch.cat([self.value_cache[layer_idx], value_states], dim=-2)
        return self.key_cache[layer_idx], self.value_cache[layer_idx]


def apply_multimodal_rotary_pos_emb(q, k, cos, sin, mrope_section):
    """cos and sin: [3, B, S, D], of which each section takes its own axis."""

    def mixed(x: Tensor) -> Tensor:
        parts = x.split(mrope_section * 2, dim=-1)
        return torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)[:, None]

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * mixed(cos) + torch.cat([-high, low], dim=-1) * mixed(sin)

    return rotated(q), rotated(k)


class Qwen2VLRotaryEmbedding(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequency = 1e6 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = (position_ids[..., None] * frequency).repeat(1, 1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Qwen2VLSdpaAttention(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, HEAD_DIM
        self.rope_scaling = {"mrope_section": SECTIONS}
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.k_proj, self.v_proj = (nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM) for _ in range(2))
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_value=None, position_embeddings=None):
        query_states, key_states, value_states = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings
        query_states, key_states = apply_multimodal_rotary_pos_emb(
            query_states, key_states, cos, sin, self.rope_scaling["mrope_section"]
        )
        past = 0
        if past_key_value is not None:
            past = past_key_value.get_seq_length()
            past = past if self.layer_idx == 0 else past - key_states.shape[-2]
            cache_kwargs = {"sin": sin, "cos": cos}
            key_states, value_states = past_key_value.update(key_states, value_states, self.layer_idx, cache_kwargs)
        mask = torch.ones(query_states.shape[2], key_states.shape[2], dtype=torch.bool).tril(past)
        if attention_mask is not None:
            # A padding row sees itself, or nothing would be left of it but NaN.
            mask = mask & attention_mask[:, None, None].bool() | mask.triu(past)
        out = F.scaled_dot_product_attention(query_states, key_states, value_states, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None, past_key_value


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(128, HIDDEN)
        self.rotary_emb = Qwen2VLRotaryEmbedding()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(HIDDEN), "self_attn": Qwen2VLSdpaAttention(index)})
            for index in range(2)
        )
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, embeds: Tensor, position_ids: Tensor, cache: DynamicCache | None, mask: Tensor | None):
        position_embeddings = self.rotary_emb(embeds, position_ids)
        for layer in self.layers:
            out, _, cache = layer["self_attn"](
                layer["norm"](embeds),
                attention_mask=mask,
                past_key_value=cache,
                position_embeddings=position_embeddings,
            )
            embeds = embeds + out
        return self.norm(embeds), cache


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.temporal_patch_size, self.in_channels, self.embed_dim = 14, 2, 3, HIDDEN
        self.proj = nn.Conv3d(3, HIDDEN, kernel_size=(2, 14, 14), stride=(2, 14, 14), bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(hidden_states.view(-1, 3, 2, 14, 14)).view(-1, HIDDEN)


class Projector(nn.Module):
    def __init__(self, input_dim: int, output_dim: int, projector_scale: int) -> None:
        super().__init__()
        self.projector_scale, self.input_dim, self.output_dim = projector_scale, input_dim, output_dim
        self.linear_feature, self.layernorm_feature = nn.Linear(input_dim, output_dim), nn.LayerNorm(input_dim)
        width = output_dim * projector_scale
        self.linear_condition, self.layernorm_condition = nn.Linear(width, output_dim), nn.LayerNorm(width)

    def updated(self, f: Tensor, conditions: Tensor | None, output_intermediate: bool):
        """f [images, tokens, H] plus its rank-one update, and what was computed on the way."""
        if conditions is None:
            return f, None
        key = self.linear_condition(self.layernorm_condition(conditions))
        attention = torch.einsum("bso,bo->bs", f, key)
        value = torch.einsum("bs,bo->bso", attention, key)
        intermediate = {"attention": attention, "value": value, "hidden_states": f}
        return f + value, intermediate if output_intermediate else None


class MinimalProjector(Projector):
    def forward(self, hidden_states, conditions=None, output_intermediate=False):
        f = self.linear_feature(self.layernorm_feature(hidden_states))
        out, intermediate = self.updated(f, conditions, output_intermediate)
        return out.reshape(-1, out.shape[-1]), intermediate


class MinimalSamProjector(Projector):
    def __init__(self, input_dim: int, output_dim: int, projector_scale: int) -> None:
        super().__init__(input_dim, output_dim, projector_scale)
        self.conv_feature = nn.Conv2d(input_dim, output_dim, kernel_size=4, stride=4)

    def forward(self, hidden_states, conditions=None, output_intermediate=False):
        normal = self.layernorm_feature(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        f = self.conv_feature(normal).flatten(2).transpose(1, 2)
        out, intermediate = self.updated(f, conditions, output_intermediate)
        return out.reshape(-1, out.shape[-1]), intermediate


class MinimalCLIPProjector(Projector):
    def __init__(self, input_dim: int, output_dim: int, projector_scale: int, spatial_merge_size: int) -> None:
        super().__init__(input_dim, output_dim, projector_scale)
        self.spatial_merge_size = spatial_merge_size

    def forward(self, hidden_states, conditions=None, output_intermediate=False, grid_thw=None):
        if conditions is None:
            return hidden_states, None
        lengths = (grid_thw.prod(-1) // self.spatial_merge_size**2).tolist()
        padded = nn.utils.rnn.pad_sequence(hidden_states.split(lengths), batch_first=True)
        out, intermediate = self.updated(padded, conditions, output_intermediate)
        return torch.cat([row[:length] for row, length in zip(out, lengths)]), intermediate


PROJECTORS = {
    "detection": lambda: MinimalProjector(48, HIDDEN, 1),
    "seg": lambda: MinimalSamProjector(16, HIDDEN, 1),
    "clip": lambda: MinimalCLIPProjector(HIDDEN, HIDDEN, 1, 2),
}


class VPT_Qwen2VLForConditionalGeneration(nn.Module):  # noqa: N801  (the authors' name)
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.visual = nn.ModuleDict({"patch_embed": PatchEmbed(), "merger": nn.Linear(4 * HIDDEN, HIDDEN)})
        self.model = LanguageModel()
        self.lm_head = nn.Linear(HIDDEN, 128, bias=False)
        setattr(self, f"{kind}_projector", PROJECTORS[kind]())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> SimpleNamespace:
        """Two passes: the first finds the control state in front of the action, the second sees what it conditions."""
        embeds = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            patches = self.visual["patch_embed"](pixel_values)
            embeds = embeds.masked_scatter(
                (input_ids == IMAGE)[..., None], self.visual["merger"](patches.view(-1, 4 * HIDDEN))
            )
        projector = getattr(self, f"{self.kind}_projector")
        options = {"grid_thw": grid_thw} if self.kind == "clip" else {}
        if features is not None:
            plain, _ = projector(features, **options)
            embeds = embeds.masked_scatter((input_ids == PAD)[..., None], plain)
        hidden, _ = self.model(embeds, position_ids, copy.deepcopy(past_key_values), attention_mask)
        control = hidden[:, :-1][input_ids[:, 1:] == ACTION]
        if features is not None:
            conditioned, _ = projector(features, control, output_intermediate=False, **options)
            embeds = embeds.masked_scatter((input_ids == PAD)[..., None], conditioned)
        embeds = embeds.masked_scatter((input_ids == ACTION)[..., None], control)
        hidden, cache = self.model(embeds, position_ids, copy.deepcopy(past_key_values), attention_mask)
        return SimpleNamespace(logits=self.lm_head(hidden), past_key_values=cache)


FEATURES = {"detection": (3, 5, 48), "seg": (3, 16, 8, 8), "clip": (11, HIDDEN)}
PADS = {"detection": (5, 5, 5), "seg": (4, 4, 4), "clip": (4, 6, 1)}
GRID = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 2, 2]])


def inputs(kind: str) -> dict[str, Tensor]:
    """A turn with one image, and three looks with their control tokens."""
    text = [5, 6, *[IMAGE] * 6, 7]
    for pads in PADS[kind]:
        text += [ACTION_START, ACTION, 9, *[PAD] * pads, 11]
    positions = torch.arange(len(text)).repeat(3, 1, 1)
    positions[1, 0, 2:8] += torch.arange(6) // 3
    positions[2, 0, 2:8] += torch.arange(6) % 3
    features = normal(*FEATURES[kind], key=("features", kind), scale=0.3)
    pixels = normal(24, 1176, key="pixels")
    given = {"input_ids": torch.tensor([text]), "position_ids": positions, "pixel_values": pixels, "features": features}
    return given | ({"grid_thw": GRID} if kind == "clip" else {})
