"""Attention of new tokens over a cache on a CPU lives here; it may import backends, checks, launch and library.

See README.md in this folder for the mathematics; the public function is in `vpt_kernels`.
"""
