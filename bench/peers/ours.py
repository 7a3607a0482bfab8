"""This engine's language model, asked the same as a peer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.loops import Loops
from bench.peers.timed import Timed
from vpt_kernels import PackedWeight
from vpt_model.config import ModelConfig
from vpt_model.network.language import LanguageModel
from vpt_model.network.state import State

LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    **{f"self_attn.{x}_proj.{part}": f"attn_{x}.{part}" for x in "qkv" for part in ("weight", "bias")},
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
}
"""A layer's tensors by their names in a checkpoint and in GGUF (llama.cpp's `qwen2`)."""


def named(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Return the language model's tensors under GGUF's names; a tied head is the embedding."""
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]
    for index in range(config.num_hidden_layers):
        for ours, theirs in LAYER.items():
            yield f"blk.{index}.{theirs}", state[f"model.layers.{index}.{ours}"]


def save(state: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write what a peer needs of them: float32 .npy files and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in named(state, config):
        np.save(folder / f"{name}.npy", tensor.float().numpy())
    (folder / "config.json").write_text(json.dumps(asdict(config)))


class Ours(Timed):
    """One conversation; a call forgets what the one before appended."""

    def __init__(self, state: Mapping[str, Tensor], config: ModelConfig, weights: str, tokens: int) -> None:
        self.language = LanguageModel(config, State(state, weights))
        self.cache = self.language.new_cache(tokens)
        self.last = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """The bytes that a token needs once: all matrices and their scales; of an untied embedding it needs a row."""
        return sum(weight.nbytes for weight in self._packed)

    def read(self, loops: Loops) -> float:
        """Return the seconds to read the matrices once."""
        buffers = [(weight.data.data_ptr(), weight.data.nbytes) for weight in self._packed]
        return loops.read(buffers, torch.get_num_threads())

    def _forget(self, behind: int) -> None:
        self.cache.truncate(behind, behind)

    @torch.inference_mode()
    def _step(self, ids: Sequence[int]) -> Tensor:
        length = self.cache.length
        positions = torch.arange(length, length + len(ids)).expand(3, -1)
        embeds = self.language.embed(torch.tensor(ids))
        hidden = self.language.forward(embeds, positions, [self.cache], [len(ids)])
        self.cache.advance(len(ids), length + len(ids))
        self.last = self.language.logits(hidden[-1:])[0]
        return self.last

    @property
    def _packed(self) -> list[PackedWeight]:
        kept = [weight for layer in self.language.layers for weight in vars(layer).values()] + [self.language.head]
        return [weight for weight in kept if isinstance(weight, PackedWeight)]
