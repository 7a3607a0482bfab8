"""Linear layers over weights packed for a CPU live here; it may import backends, checks, launch and library.

See README.md in this folder for the mathematics; the public functions are in `vpt_kernels`.
"""
