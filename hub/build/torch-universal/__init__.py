"""The repository that the Hugging Face `kernels` library loads; the code is the installed package `vpt_kernels`."""

from . import layers

__all__ = ["layers"]
