"""Other engines over the same weights live here, `make bench-peers`; it may import cases, environment, loops and
timers.

`llama` is a process of its own, in an environment of its own, that writes our random weights as a GGUF file and runs
them through llama.cpp; `ours` does the same through this engine; `measure` takes them in turn. What is compared is the
language model alone: the append of a second look's tokens, and the tokens behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0"}
"""Our precisions and the GGUF format of as many bits; int8 has a scale a row, Q8_0 one for every 32 weights."""


@dataclass(frozen=True)
class Shape:
    """What is timed: `append` tokens behind `behind` others, then `decode` tokens one by one."""

    behind: int = 350
    append: int = 270
    decode: int = 16

    @property
    def tokens(self) -> int:
        return self.behind + self.append + self.decode
