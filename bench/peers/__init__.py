"""Other engines over the same weights live here, `make bench-peers`; it may import cases, environment, loops and
timers.

`llama` and `openvino` are processes of their own, in an environment of their own: each makes of our random weights what
it runs, llama.cpp's GGUF file or OpenVINO's graph, and is asked over `process`; `ours` does the same through this
engine; `measure` takes them in turn. What is compared is the language model alone: the append of a second look's
tokens, and the tokens behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

PEERS = {"llama.cpp": "bench.peers.llama", "OpenVINO": "bench.peers.openvino"}
"""What a peer is called, and the module that its process runs."""


@dataclass(frozen=True)
class Shape:
    """What is timed: `append` tokens behind `behind` others, then `decode` tokens one by one."""

    behind: int = 350
    append: int = 270
    decode: int = 16

    @property
    def tokens(self) -> int:
        return self.behind + self.append + self.decode
