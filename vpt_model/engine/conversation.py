"""What the engine keeps of one request while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vpt_model.engine.events import Clock, Look
from vpt_model.engine.perception import Ahead
from vpt_model.engine.sampling import Sampler
from vpt_model.network.cache import KVCache


@dataclass
class Turn:
    """What the model generated in one round. `end`: a finish reason of `Answer`, or "action" (a look follows)."""

    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    end: str = ""


@dataclass
class Conversation:
    """One request and how far it has come."""

    cache: KVCache
    clock: Clock
    image: Tensor | None = None  # uint8 [height, width, 3]
    forced: deque[list[int]] = field(default_factory=deque)  # answers of the next rounds
    max_new_tokens: int = 64
    keep_logits: bool = False
    choose: Sampler = field(default_factory=Sampler)
    features: Tensor | None = None  # [N, H], the first look
    grids: tuple[tuple[int, int], ...] = ()
    ahead: Ahead | None = None  # the re-encoder's work on the image, begun before it is asked for
    header: tuple[int, int] = (0, 0)  # length and next position of the cache behind the current assistant header
    last: int | None = None  # the token fed last, its hidden state [1, H] and what follows it, float32 [vocab]
    hidden: Tensor | None = None
    logits: Tensor | None = None
    likeliest: Tensor | None = None  # `greedy(logits)` where the step that made them chose, too
    turns: list[Turn] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Tokens that a conversation wants appended, at positions [3, T], with embeddings [T, H], or None for their own.

    Once fed, the conversation knows the last one's hidden state and, with `sample`, the logits of what follows.
    """

    talk: Conversation
    tokens: Sequence[int]
    embeds: Tensor | None
    positions: Tensor
    sample: bool
