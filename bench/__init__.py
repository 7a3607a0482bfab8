"""Suites, timers, baselines and reports live here; bench may import vpt_kernels and vpt_model."""
