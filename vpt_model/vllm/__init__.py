"""The second look inside vLLM lives here; it may import network, checkpoint, text, config and vpt_kernels.

Nothing is imported on import: vLLM loads `plugin` by its entry point, the rest when it serves a VPT checkpoint.
"""
