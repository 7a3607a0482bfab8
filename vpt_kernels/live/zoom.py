"""`zoom`: the loop of models that call a zoom-in tool, over one live conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vpt_kernels.checks import require_integer, require_type, shown
from vpt_kernels.live.conversation import LiveConversation

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_BOXES = ("bbox_2d", "bbox", "box")


@dataclass(frozen=True)
class Zoom:
    """A request to look at a part of an image: box (left, top, right, bottom), the image's number, what is there."""

    box: tuple[float, float, float, float]
    image: int = 0
    label: str = ""


@dataclass
class ZoomAnswer:
    """What `zoom` returns.

    Attributes:
        text: the last answer. turns: all answers, tool calls included. boxes: (image, left, top, right, bottom) in
            pixels per crop that was shown. conversation: still open; ask on, or close it.
    """

    text: str
    conversation: LiveConversation = field(repr=False)
    turns: list[str] = field(default_factory=list)
    boxes: list[tuple[int, int, int, int, int]] = field(default_factory=list)


def parse_zoom_calls(text: str) -> list[Zoom]:
    """Return the zooms that an answer asks for in the format of Qwen's `image_zoom_in_tool`, as DeepEyes writes it,
    too.

    A call is `<tool_call>{"name": …, "arguments": {"bbox_2d": [left, top, right, bottom], "label": …, "img_idx": …}}
    </tool_call>`; `bbox` and `box` are read like `bbox_2d`, and arguments may be JSON in a string. What is no such call
    is passed over: an answer without any is final.
    """
    require_type("text", text, str, "a string")
    found = []
    for written in _CALL.findall(text):
        try:
            call = json.loads(written)
            arguments = call.get("arguments", call)
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            box = next(arguments[name] for name in _BOXES if name in arguments)
            left, top, right, bottom = map(float, box)
            image = arguments.get("img_idx", arguments.get("image", 0))
            found.append(Zoom((left, top, right, bottom), int(image), str(arguments.get("label", ""))))
        except (ValueError, TypeError, AttributeError, StopIteration):
            continue  # a model may write anything
    return found


def zoom(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    *,
    parser: Callable[[str], Sequence[Zoom]] = parse_zoom_calls,
    coordinates: str = "pixels",
    max_looks: int = 4,
    role: str = "user",
    system: str | None = None,
    template: dict[str, Any] | None = None,
    cache: Any = "dynamic",
    capacity: int | None = None,
    **generate: Any,
) -> ZoomAnswer:
    """Ask about an image and show the model every part that it asks to see, until it answers without asking.

    Every token passes the model once. A box outside the image is cut to it; one that holds no pixel, or names an
    unknown image, is answered with the reason in words, as a tool would.

    Args:
        model, processor, cache, capacity: as of `LiveConversation`. image: what `decode_image` takes.
        parser: an answer's text → the zooms it asks for; none ends the loop.
        coordinates: what the model writes boxes in, as of `LiveConversation.crop`.
        max_looks: answers that may ask for crops; the answer after the last one is final, whatever it says.
        role: of the messages that bring crops. system: a first message. template: arguments of the chat template, such
            as {"tools": […]}. generate: arguments of the model's `generate`.

    Raises:
        TypeError, ValueError: as `LiveConversation`, its `add` and its `generate` do.
    """
    max_looks = require_integer("max_looks", max_looks, 0)
    require_type("question", question, str, "a string")
    require_type("system", system, (str, type(None)), "a string or None")
    require_type("role", role, str, "a string")
    require_type("template", template, (dict, type(None)), "a dictionary or None")
    for name in template or ():
        require_type("a key of template", name, str, "the name of an argument")
    if not callable(parser):
        raise TypeError(f"parser is {shown(parser)}; it must be a function of an answer's text")
    conversation = LiveConversation(model, processor, cache=cache, capacity=capacity)
    try:
        messages = [] if system is None else [{"role": "system", "content": system}]
        asking = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        conversation.add([*messages, {"role": "user", "content": asking}], **(template or {}))
        answer = ZoomAnswer("", conversation)
        while True:
            before = len(conversation.ids)
            conversation.generate(**generate)
            answer.text = processor.tokenizer.decode(conversation.ids[before:], skip_special_tokens=True)
            answer.turns.append(answer.text)
            asked = parser(answer.text) if len(answer.turns) <= max_looks else ()
            require_type("what parser returns", asked, (list, tuple, type(None)), "a list of Zoom, or None")
            if not asked:
                return answer
            content = [part for request in asked for part in _shown(answer, request, coordinates)]
            conversation.add([{"role": role, "content": content}], **(template or {}))
    except BaseException:
        conversation.close()
        raise


def _shown(answer: ZoomAnswer, request: Zoom, coordinates: str) -> list[dict[str, Any]]:
    """Return the parts of a message that answer one request: the crop, or why there is none."""
    try:
        pixels, box = answer.conversation.cut(request.box, request.image, coordinates, clip=True)
    except ValueError as error:
        return [{"type": "text", "text": f"No crop: {error}"}]
    answer.boxes.append((request.image, *box))
    return [{"type": "image", "image": pixels}]
