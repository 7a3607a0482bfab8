"""What may be asked: every argument of a question is checked before anything runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from vpt_kernels import decode_image
from vpt_model.config import require_integer, require_type, shown
from vpt_model.engine import perception
from vpt_model.engine.conversation import Picture, Question
from vpt_model.engine.loop import Loop
from vpt_model.engine.sampling import Sampler, Sampling
from vpt_model.text.tokens import parse_look


def admit(
    loop: Loop,
    picture: Picture | None,
    question: Any,
    looks: Sequence[str] | None,
    max_looks: int,
    max_new_tokens: int,
    keep_logits: bool,
    sampling: Sampling | None,
) -> Question:
    """Return a checked question; arguments and errors as in `Engine.stream`. picture: new where it has no features
    yet.
    """
    if not isinstance(question, str):
        raise TypeError(f"question is a {type(question).__name__}; it must be a string")
    max_new_tokens = require_integer("max_new_tokens", max_new_tokens, 1)
    require_type("keep_logits", keep_logits, bool, "True or False")
    require_type("sampling", sampling, (Sampling, type(None)), "a Sampling, or None for greedy decoding")
    require_type("looks", looks, (list, tuple, type(None)), "a list of looks, or None")
    looks = looks or ()
    forced = deque(parse_look(spec, loop.ids) for spec in looks)
    if len(forced) > max_looks:
        raise ValueError(f"{len(forced)} looks are forced but max_looks is {max_looks}: raise it or drop looks")
    if forced and picture is None:
        raise ValueError(f"look {looks[0]!r} needs an image and there is none: pass an image or drop the look")
    is_new = picture is not None and picture.features is None
    user = loop.tokenizer.encode(loop.prompt.user_text(question, is_new))
    # The action token has no embedding of its own: its input is a state of the model, which no question has.
    if reserved := sorted({token for token in user if token in loop.ids.stop or token == loop.ids.action}):
        raise ValueError(f"the question contains special tokens (ids {reserved}): remove them from the text")
    for spec, answer in zip(looks, forced, strict=True):
        assert picture is not None, "looks without an image were refused"
        boxes = loop.boxes(picture, answer)
        if picture.pixels is None and (boxes or loop.encoder is not None):
            raise ValueError(
                f"look {spec!r} needs the picture's pixels, which were not kept: show it again, or use keep_pixels=True"
            )
    asked = Question(user, picture, forced, Sampler(sampling), max_new_tokens, max_looks, keep_logits)
    asked.notices += picture.notices if picture is not None and is_new else ()
    return asked


def uploaded(image: Any, device: torch.device) -> Picture:
    """Return an image (what `decode_image` takes) on `device`, which no conversation has been shown yet."""
    notices: list[str] = []
    pixels = perception.upload(decode_image(image, notices=notices), device)
    height, width = pixels.shape[:2]
    return Picture(pixels, (height, width), notices=tuple(notices))


def paired(
    images: Sequence[Any], questions: Sequence[str], looks: Sequence[Sequence[str] | None] | None
) -> list[tuple[Any, str, Sequence[str] | None]]:
    """Return the rows of a batch: image, question and forced looks of each; errors as in `Engine.ask_batch`."""
    for name, rows in (("images", images), ("questions", questions), ("looks", looks)):
        if not isinstance(rows, (list, tuple)) and (rows is not None or name != "looks"):
            raise TypeError(f"{name} is {shown(rows)}; it must be a list, with one entry for every row")
    looks = [None] * len(questions) if looks is None else looks
    if not len(images) == len(questions) == len(looks):
        raise ValueError(
            f"{len(images)} images, {len(questions)} questions and {len(looks)} lists of looks were given: "
            "give one of each for every row (None for no image, None for no forced looks)"
        )
    return list(zip(images, questions, looks, strict=True))
