"""Live conversations with models of transformers live here: every token passes the model once."""

from vpt_kernels.live.conversation import LiveConversation
from vpt_kernels.live.zoom import Zoom, ZoomAnswer, parse_zoom_calls, zoom

__all__ = ["LiveConversation", "Zoom", "ZoomAnswer", "parse_zoom_calls", "zoom"]
