"""vpt-mini lives here, a trained model of two million parameters that really looks twice, with the task that it was
trained on; it may import engine, network, checkpoint, text, config and vpt_kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from vpt_model.checkpoint import Checkpoint
from vpt_model.config import ModelConfig
from vpt_model.network.model import Model
from vpt_model.text.tokens import Tokenizer

FOLDER = Path(__file__).parent / "weights"
"""The shipped checkpoint, laid out like a released one."""


def load_state(
    dtype: torch.dtype = torch.float32, folder: Path = FOLDER
) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Return vpt-mini's configuration, weights in `dtype` and tokenizer. Raises ValueError if the files are damaged."""
    checkpoint = Checkpoint.open(folder)
    tokenizer = checkpoint.tokenizer()
    return checkpoint.config, checkpoint.load(dtype), tokenizer


def load(dtype: torch.dtype = torch.float32, folder: Path = FOLDER) -> tuple[Model, Tokenizer]:
    """Return vpt-mini as `load_state` does, ready for an `Engine`."""
    config, state, tokenizer = load_state(dtype, folder)
    return Model.from_state(config, state), tokenizer
