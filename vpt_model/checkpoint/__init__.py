"""Folders become one state dict here, whatever form a checkpoint is stored in; it may import text, config and
vpt_kernels."""

from vpt_model.checkpoint.draw import random_state, random_weights
from vpt_model.checkpoint.load import Checkpoint, load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "random_state", "random_weights"]
