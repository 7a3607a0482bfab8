"""Crop, resize and patch embedding of regions live here; it may import backends, checks, launch and library.

See README.md in this folder for the mathematics; the public functions are in `vpt_kernels`.
"""
