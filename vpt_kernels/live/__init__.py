"""Live conversations with models of transformers, where every token passes the model once, live here; it may import
patch, roi_patch_embed, checks, images and processor."""

from vpt_kernels.live.conversation import LiveConversation
from vpt_kernels.live.zoom import Zoom, ZoomAnswer, parse_zoom_calls, zoom

__all__ = ["LiveConversation", "Zoom", "ZoomAnswer", "parse_zoom_calls", "zoom"]
