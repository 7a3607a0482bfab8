"""The chat layout of VPT as pure functions on token ids. Source: the published `vpt_qwen2_vl` template.

<|im_start|>system␤You are a helpful assistant.<|im_end|>␤
<|im_start|>user␤<|vision_start|>{pads}<|vision_end|>␤{question}␤{trigger}<|im_end|>␤
<|im_start|>assistant␤{first answer}<|im_end|>␤
<|im_start|>user␤{second look}<|im_end|>␤
<|im_start|>assistant␤{answer}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vpt_model.config import require_type
from vpt_model.text.tokens import TokenIds

REGION_TRIGGER = "Identify the region that can help you answer the question, and then answer the question."
REENCODE_TRIGGER = "Require additional perception features, and then answer the question."
ANSWER_PREFIX = "Now answer the question.\n"
"""What the models were trained to print before a second-round answer."""


@dataclass(frozen=True)
class PromptFormat:
    """The texts around the question.

    The separators of the training data are not published; newlines are what two code bases built on the data use.
    `trigger` is the sentence that asks for a second look, such as `REGION_TRIGGER`; None leaves it to the model.
    """

    system: str = "You are a helpful assistant."
    image_separator: str = "\n"
    trigger_separator: str = "\n"
    trigger: str | None = None

    def __post_init__(self) -> None:
        for name in ("system", "image_separator", "trigger_separator"):
            require_type(name, getattr(self, name), str, "a string")
        require_type("trigger", self.trigger, (str, type(None)), "a string or None")

    def user_text(self, question: str, image: bool) -> str:
        """Return the text of the first user turn, behind the image if there is one."""
        require_type("question", question, str, "a string")
        require_type("image", image, bool, "True or False")
        text = self.image_separator + question if image else question
        return text if self.trigger is None else text + self.trigger_separator + self.trigger


def first_round(ids: TokenIds, system: Sequence[int], user: Sequence[int], image_tokens: int | None) -> list[int]:
    """Return the prompt up to and including the assistant header.

    system, user: ids of the two texts. image_tokens: pads of the image before the user's text; None: no image.
    """
    head = [ids.im_start, ids.system, ids.newline, *system, ids.im_end, ids.newline]
    return head + _user_turn(ids, [*_image(ids, ids.image_pad, image_tokens), *user])


def next_round(ids: TokenIds, user: Sequence[int], image_tokens: int | None) -> list[int]:
    """Return what follows an answer when the user speaks again: the answer's end, the user's turn, the assistant
    header.

    user, image_tokens: as in `first_round`.
    """
    return [ids.im_end, ids.newline, *_user_turn(ids, [*_image(ids, ids.image_pad, image_tokens), *user])]


def region_round(ids: TokenIds, image_tokens: Sequence[int], encode: Callable[[str], list[int]]) -> list[int]:
    """Return what follows the first answer when its regions are shown: the answer's end, the crops, the assistant
    header.

    image_tokens: pads of each crop. One crop stands alone (12 ids and its pads); several are numbered from 0.
    `encode` turns the numbering into ids.
    """
    if len(image_tokens) == 1:
        shown = _image(ids, ids.image_pad, image_tokens[0])
    else:
        # A label is encoded with the newline that ends the line before it: a token may span both.
        shown = []
        for i, count in enumerate(image_tokens):
            label = f"Region {i}: " if i == 0 else f"\nRegion {i}: "
            shown += [*encode(label), *_image(ids, ids.image_pad, count)]
        shown += [ids.newline]
    return [ids.im_end, ids.newline, *_user_turn(ids, shown)]


def action_round(ids: TokenIds, image_tokens: int) -> list[int]:
    """Return what follows the action start token: the rest of the action span and the re-encoded image's turn.

    image_tokens: tokens of the re-encoded image; the result has 14 more.
    """
    _, action, action_end = ids.action_span
    assert ids.kind_pad is not None, "a tokenizer with action tokens has the pad of their kind"
    return [action, action_end, ids.im_end, ids.newline, *_user_turn(ids, _image(ids, ids.kind_pad, image_tokens))]


def _image(ids: TokenIds, pad: int, count: int | None) -> list[int]:
    return [] if count is None else [ids.vision_start, *[pad] * count, ids.vision_end]


def _user_turn(ids: TokenIds, content: Sequence[int]) -> list[int]:
    user = [ids.im_start, ids.user, ids.newline, *content, ids.im_end, ids.newline]
    return [*user, ids.im_start, ids.assistant, ids.newline]
