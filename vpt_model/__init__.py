"""A slim visual-perception-token model (arXiv 2502.17425): look at an image, then look again, in one conversation."""

from vpt_model.checkpoint import load_checkpoint
from vpt_model.config import PRESETS, ModelConfig
from vpt_model.engine import Engine
from vpt_model.engine.events import Answer, Done, Look, Reencode, Region, Stage, Token
from vpt_model.engine.sampling import Sampling
from vpt_model.network.model import Model
from vpt_model.text.prompt import REENCODE_TRIGGER, REGION_TRIGGER, PromptFormat
from vpt_model.text.tokens import TokenIds, Tokenizer

__all__ = [
    "PRESETS",
    "REENCODE_TRIGGER",
    "REGION_TRIGGER",
    "Answer",
    "Done",
    "Engine",
    "Look",
    "Model",
    "ModelConfig",
    "PromptFormat",
    "Reencode",
    "Region",
    "Sampling",
    "Stage",
    "Token",
    "TokenIds",
    "Tokenizer",
    "load_checkpoint",
]
