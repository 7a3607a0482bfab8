"""Image input: anything that Pillow opens, or pixels, becomes one uint8 tensor."""

from vpt_kernels import decode_image

__all__ = ["decode_image"]
