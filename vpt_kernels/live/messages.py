"""Chat messages as a template wants them, and their pictures apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vpt_kernels.checks import shown


class Messages:
    """The history of a conversation in messages; the pictures are kept in its order by whoever owns this."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._history: list[dict[str, Any]] = []
        self._answer: int | None = None  # where the ids of the answer to the last messages begin

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text as it stands."""
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; it must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at {error.start}, which is no character: remove it") from None
        return self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def joined(
        self, messages: Sequence[Mapping[str, Any]], ids: Sequence[int]
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Return the history with the last answer, read from `ids`, and the new messages; and the new messages'
        pictures.

        Raises:
            TypeError, ValueError: no message, or one that is not made of a role, texts and images.
        """
        if not isinstance(messages, (list, tuple)) or not messages:
            raise TypeError(f"messages is {shown(messages)}; give a list of dictionaries with a role and a content")
        pictures: list[Any] = []
        new = [_separated(message, pictures) for message in messages]
        history = list(self._history)
        if self._answer is not None and len(ids) > self._answer and new[0]["role"] != "assistant":
            text = self._processor.tokenizer.decode(ids[self._answer :], skip_special_tokens=True)
            history.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        return history + new, pictures

    def rendered(self, history: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """Return the history as text, with the header of the next answer."""
        given = {"tokenize": False, "add_generation_prompt": True} | dict(options)
        if given["tokenize"] or not given["add_generation_prompt"]:
            raise ValueError("tokenize and add_generation_prompt follow from the conversation: leave them out")
        return self._processor.apply_chat_template(history, **given)

    def unanswered(self, ids: Sequence[int]) -> bool:
        """Return whether nothing stands behind the header that invites an answer: the next messages replace that
        header.
        """
        return self._answer == len(ids)

    def accept(self, history: list[dict[str, Any]], answer: int) -> None:
        """Take `history` as what was said; the answer's ids begin at `answer`."""
        self._history, self._answer = history, answer


def _separated(message: Mapping[str, Any], pictures: list[Any]) -> dict[str, Any]:
    """Return the message without pixels; its pictures join `pictures`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"a message is {message!r:.200}; it must be a dictionary with a role and a content")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"the content of a message is {content!r:.200}; it must be a text or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif (
            kind == "image"
            and (source := next((part[k] for k in ("image", "path", "url") if k in part), None)) is not None
        ):
            pictures.append(source)
            parts.append({"type": "image"})
        else:
            raise ValueError(
                f"a part of the content is {part!r:.200}; give {{'type': 'text', 'text': …}} or "
                "{'type': 'image', 'image': …}"
            )
    return {**message, "content": parts}


def expanded(ids: Sequence[int], image: int, counts: Sequence[int]) -> tuple[list[int], list[range]]:
    """Return `ids` with every image token repeated as often as its picture has visual tokens, and where they lie.

    Raises:
        ValueError: the template shows another number of images than there are.
    """
    if (shown := sum(token == image for token in ids)) != len(counts):
        raise ValueError(
            f"the template shows {shown} images and the conversation has {len(counts)}: pictures that came by append() "
            "or crop() are in no message, so go on with append(), or with add() alone"
        )
    out: list[int] = []
    spans, left = [], iter(counts)
    for token in ids:
        if token != image:
            out.append(token)
            continue
        spans.append(range(len(out), len(out) + next(left)))
        out += [image] * len(spans[-1])
    return out, spans
