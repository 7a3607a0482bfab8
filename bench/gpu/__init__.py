"""Ten minutes of a GPU live here, `make gpu`, or without one `make gpu-rehearsal`; it may import cases, environment,
transformers_model and workloads.

`parts` says what runs, in which order and how long; `session` runs it and loses nothing to a part that hangs, crashes
or leaves processes behind; `engine`, `rivals` and `operators` measure, `timing` times. Every measurement is a line of
`results.jsonl` as soon as it is there. In a rehearsal the same code runs on a CPU: tiny models, the C++ backend or
Triton's interpreter in the kernels' place, so that no number of it means anything.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

RESULTS = "VPT_GPU_RESULTS_FILE"
"""The environment variable that names `results.jsonl` to a part's processes."""
PART = "VPT_GPU_PART"
"""The environment variable that holds a part's name in every process that it starts."""
REHEARSAL = os.environ.get("VPT_GPU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"


def record(name: str, **facts: object) -> None:
    """Add one line to `results.jsonl`, on the disk when this returns; print it where there is no such file."""
    line = json.dumps({"part": os.environ.get(PART, ""), "name": name, **facts}) + "\n"
    path = os.environ.get(RESULTS)
    if path is None:
        print(line, end="", flush=True)
        return
    with Path(path).open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
