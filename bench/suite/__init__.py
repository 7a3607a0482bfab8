"""The rows that pytest-benchmark measures live here, one module per kind; it may import budget, cases, environment,
report, rooflines, rows, timers and workloads.
"""
