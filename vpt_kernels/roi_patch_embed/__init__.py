"""See README.md in this folder for the mathematics; the public functions are in `vpt_kernels`."""
