"""Perception tokens, their grammar and the prompts around them live here; it may import config."""
