"""The multi-pass loop over live caches lives here, its conversations and what runs them; it may import network,
checkpoint, text, config and vpt_kernels."""

from vpt_model.engine.chat import Chat
from vpt_model.engine.engine import Engine
from vpt_model.engine.events import Answer, Box, Done, Event, Look, Reencode, Region, Stage, Token
from vpt_model.engine.sampling import Sampling

__all__ = [
    "Answer",
    "Box",
    "Chat",
    "Done",
    "Engine",
    "Event",
    "Look",
    "Reencode",
    "Region",
    "Sampling",
    "Stage",
    "Token",
]
