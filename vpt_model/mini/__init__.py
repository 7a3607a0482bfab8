"""vpt-mini: a trained model of two million parameters that really looks twice, and the task that it was trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from vpt_model.checkpoint import Checkpoint
from vpt_model.model import Model
from vpt_model.tokens import Tokenizer

FOLDER = Path(__file__).parent / "weights"
"""The shipped checkpoint, laid out like a released one."""


def load(dtype: torch.dtype = torch.float32, folder: Path = FOLDER) -> tuple[Model, Tokenizer]:
    """vpt-mini with its weights in `dtype`, and its tokenizer. Raises ValueError if the folder's files are damaged."""
    checkpoint = Checkpoint.open(folder)
    tokenizer = checkpoint.tokenizer()
    return Model.from_state(checkpoint.config, checkpoint.load(dtype)), tokenizer
