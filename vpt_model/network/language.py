"""The Qwen2-VL language model over ragged, append-only caches.

Prefilling a prompt, appending a second look and decoding one token are the same call: T new tokens enter, their keys
and values are rotated and written in place behind what the cache holds, and they attend to everything before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from vpt_kernels import PackedWeight, rotary_table
from vpt_model.config import ModelConfig
from vpt_model.network import decode, fused
from vpt_model.network.attention import Padded, Ragged, Rotary
from vpt_model.network.cache import KVCache
from vpt_model.network.capture import uploaded
from vpt_model.network.decode.reference import greedy
from vpt_model.network.linear import gated_linear, linear, onto
from vpt_model.network.state import State, Weight


@dataclass
class _Layer:
    input_norm: torch.Tensor
    qkv_weight: Weight
    qkv_bias: torch.Tensor
    o_weight: Weight
    post_norm: torch.Tensor
    gate_up_weight: Weight
    down_weight: Weight

    @classmethod
    def from_state(cls, state: State, prefix: str) -> _Layer:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return cls(
            input_norm=state.tensor(f"{prefix}input_layernorm.weight"),
            qkv_weight=state.weight(*(f"{attention}{x}_proj.weight" for x in "qkv")),
            qkv_bias=state.tensor(*(f"{attention}{x}_proj.bias" for x in "qkv")),
            o_weight=state.weight(f"{attention}o_proj.weight"),
            post_norm=state.tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up_weight=state.weight(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight", gated=True),
            down_weight=state.weight(f"{mlp}down_proj.weight"),
        )


class LanguageModel:
    """Qwen2-VL's decoder, built from a state dict with the checkpoint's names; forward only.

    Source: Qwen2-VL in transformers (RMSNorm in float32 cast before its weight, multimodal rotary sections, biased
    q/k/v, SwiGLU). Query, key and value weights, and gate and up weights, are concatenated once, here, unless they
    already follow each other in memory, as those of a loaded checkpoint do. Of packed weights a tied head is the
    embedding, too.
    """

    def __init__(self, config: ModelConfig, state: State) -> None:
        self.config, self.dtype, self.device = config, state.dtype, state.device
        self.cache_dtype = state.cache_dtype
        # In the order of their names, in which weights that are drawn as they are taken come one by one.
        self.embedding: Weight
        if config.tie_word_embeddings:
            self.embedding = self.head = state.weight("lm_head.weight")
            state.finish("model.embed_tokens.weight")
        else:
            self.embedding = state.table("model.embed_tokens.weight")
        self.layers = [_Layer.from_state(state, f"model.layers.{index}.") for index in range(config.num_hidden_layers)]
        self.norm = state.tensor("model.norm.weight")
        if not config.tie_word_embeddings:
            self.head = state.weight("lm_head.weight")
        table = rotary_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.rotary = Rotary(table.to(self.device), config.mrope_section)

    def new_cache(self, capacity: int, rows: int | None = None) -> KVCache:
        """Return an empty cache of this model's shape and device for `capacity` tokens; `rows` as of `KVCache`."""
        return KVCache(self.config, capacity, self.cache_dtype, self.device, rows)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return input embeddings `[T, H]` of token ids int64 `[T]`; a fresh tensor the caller may write into."""
        if isinstance(self.embedding, PackedWeight):
            return self.embedding.rows(ids)
        return F.embedding(uploaded(ids, self.device), self.embedding).to(self.dtype)

    def forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[KVCache],
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """Write `lengths[i]` tokens behind what `caches[i]` holds and return the hidden states behind the final norm.

        embeds: [T, H], the tokens of all conversations one after the other, without padding (T = sum(lengths)).
        positions: int64 [3, T] on the CPU, M-RoPE positions of the same tokens (`mrope_positions`).
        Returns [T, H]; the row of an action-start token is the control state of its look. The caches do not count the
        tokens as stored until the caller advances them (`KVCache.advance`).

        Raises ValueError before anything is written if the shapes disagree, a cache appears twice, or any cache
        cannot take its tokens.
        """
        self._check(embeds, positions, caches, lengths)
        attend = Ragged(caches, lengths, uploaded(positions, self.device), self.rotary, self.dtype)
        return self.run(embeds, attend)

    def run(self, x: torch.Tensor, attend: Ragged | Padded) -> torch.Tensor:
        """Run all layers and the final norm: embeddings [T, H] → hidden states [T, H]. Nothing is read by the host."""
        eps = self.config.rms_norm_eps
        delta: torch.Tensor | None = None
        if isinstance(attend, Padded) and attend.tickets is not None and len(x) == len(attend.lengths[0]):
            if decode.serves(x):
                from vpt_model.network.decode import layers

                # On a GPU, where alone this is served, no weight is packed.
                plain = cast("Sequence[layers.Layer]", self.layers)
                x = layers.run(plain, eps, x, attend, attend.tickets)
                return fused.add_rms_norm(x, None, self.norm, eps)[1]
        for index, layer in enumerate(self.layers):
            x, normed = fused.add_rms_norm(x, delta, layer.input_norm, eps)
            x, delta = onto(x, self._attention(index, layer, normed, attend), layer.o_weight)
            x, normed = fused.add_rms_norm(x, delta, layer.post_norm, eps)
            x, delta = onto(x, gated_linear(normed, layer.gate_up_weight), layer.down_weight)
        return fused.add_rms_norm(x, delta, self.norm, eps)[1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return next-token logits float32 `[n, vocab]` of the rows `[n, H]`; pass only those that are sampled from."""
        return linear(hidden, self.head).float()

    def choose(self, hidden: torch.Tensor, tickets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `logits` of the rows `[n, H]` and the `greedy` choice of each. tickets: as of `Padded`."""
        if decode.serves(hidden):
            from vpt_model.network.decode.head import head

            return head(hidden, cast(torch.Tensor, self.head), tickets)
        logits = self.logits(hidden)
        return logits, greedy(logits)

    def _check(
        self, embeds: torch.Tensor, positions: torch.Tensor, caches: Sequence[KVCache], lengths: Sequence[int]
    ) -> None:
        if len(caches) != len(lengths) or len({id(cache) for cache in caches}) != len(caches):
            raise ValueError(
                f"{len(caches)} caches and {len(lengths)} lengths were given; "
                "give every conversation one cache of its own and one length"
            )
        total = sum(lengths)
        if embeds.shape != (total, self.config.hidden_size) or positions.shape != (3, total):
            raise ValueError(
                f"embeds is {tuple(embeds.shape)} and positions is {tuple(positions.shape)}; lengths {list(lengths)} "
                f"need [{total}, {self.config.hidden_size}] and [3, {total}]"
            )

    def _attention(self, index: int, layer: _Layer, x: torch.Tensor, attend: Ragged | Padded) -> torch.Tensor:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        packed = linear(x, layer.qkv_weight, layer.qkv_bias).view(-1, heads + 2 * kv_heads, config.head_dim)
        return attend(index, *packed.split([heads, kv_heads, kv_heads], dim=1))
