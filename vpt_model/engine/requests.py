"""What the loop asks for, and what it is told: the only words that pass between it and whatever runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from vpt_kernels import RegionPlan
from vpt_model.engine.conversation import Conversation, Picture
from vpt_model.engine.sampling import Sampler


@dataclass(frozen=True, kw_only=True)
class Append:
    """Feed tokens, with embeddings [T, H] or their own, at positions int64 [3, T] (on the CPU).

    next_position: of the token that follows. logits: whether those behind the last token are wanted. sampler: chooses
    the token that follows; None where it is already known. ahead: as in `Decode`. stage: under which name the time is
    counted.
    """

    conversation: Conversation
    tokens: Sequence[int]
    positions: Tensor
    next_position: int
    embeds: Tensor | None = None
    logits: bool = True
    sampler: Sampler | None = None
    ahead: int = 0
    stage: str = "append"

    def timed(self) -> AbstractContextManager[None]:
        """Return a context whose time is counted as the append's."""
        return self.conversation.clock(self.stage, tokens=len(self.tokens), lm_calls=1)


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Feed a generated token, behind the forced ones before it, at the next positions; choose the one that follows.

    `ahead` more may follow: whoever runs the request may feed the token that it chooses before it is asked to, and
    forgets it where another request comes instead. embeds: [1, H] of a token that comes alone, or None for the tokens'
    own embeddings.
    """

    conversation: Conversation
    tokens: Sequence[int]
    embeds: Tensor | None = None
    sampler: Sampler | None = None
    ahead: int = 0


@dataclass(frozen=True, kw_only=True)
class CropAndAppend:
    """Look at the regions of `plan` in a picture and feed the tokens, whose `pad` ones take the features in order.

    positions, next_position, sampler, stage: as in `Append`. again: whether the picture may later be re-encoded.
    """

    conversation: Conversation
    picture: Picture
    plan: RegionPlan
    tokens: Sequence[int]
    pad: int
    positions: Tensor
    next_position: int
    sampler: Sampler | None = None
    stage: str = "append"
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class ReencodeAndAppend:
    """Feed the first token; under its hidden state h*, re-encode the picture, and feed the other tokens.

    h* is the embedding of the second token; the `pad` tokens, which follow each other, take the re-encoded image.
    positions: [3, T] of all tokens. control: h* [1, H] where the first token has already been fed; then features are
    the picture as the projector reads it.
    """

    conversation: Conversation
    picture: Picture
    tokens: Sequence[int]
    pad: int
    positions: Tensor
    next_position: int
    sampler: Sampler | None = None
    control: Tensor | None = None
    features: Tensor | None = None


Request = Append | Decode | CropAndAppend | ReencodeAndAppend


@dataclass(frozen=True)
class Output:
    """What is known once a request has been run.

    fed: the last token that was fed. hidden: its final hidden state [1, H]. logits: float32 [vocab] of what follows.
    token: what follows, by the request's sampler; None if the logits are NaN or there was no sampler. features: [N, H]
    of each region that was looked at.
    """

    fed: int
    hidden: Tensor
    logits: Tensor | None = None
    token: int | None = None
    features: tuple[Tensor, ...] = ()
