"""`LiveConversation`: a chat with a vision-language model of transformers whose cache is continued, never rebuilt."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpt_kernels.checks import require_flag, require_integer, require_type, shown
from vpt_kernels.images import decode_image
from vpt_kernels.live.family import Family
from vpt_kernels.live.fed import Fed, Pending
from vpt_kernels.live.messages import Messages, expanded
from vpt_kernels.live.pictures import Pictures, box_in_pixels
from vpt_kernels.live.shared import Shared

_OURS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "mm_token_type_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "cache_implementation",
    "use_cache",
)
"""Arguments of `generate` that follow from the conversation."""


@dataclass
class _Picture:
    """One image: decoded, uint8 [height, width, 3], its grid in patches, and where its tokens lie in `ids`.

    inputs: the model's arguments for it, until they are fed; None also where they are made of the weights of then.
    """

    pixels: Tensor
    grid: tuple[int, ...]
    inputs: dict[str, Tensor] | None
    span: range = range(0)


class LiveConversation:
    """A conversation with a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or another M-RoPE model of transformers.

    Only new tokens pass the vision tower and the language model, whatever came before. The ids and, up to rounding,
    the logits are those of generating from the whole conversation anew. The model's attention and patch embedding run
    on this package's kernels where `patch` knows them, and on the model's own code elsewhere.

    Conversations over one model may interleave, and calls from several threads wait for each other, because positions
    are state of the model. One conversation serves one call at a time. Several conversations are answered one by one:
    transformers could batch them only with all their caches copied into a padded one. Use a conversation as a context
    manager or call `close()`; a forgotten one gives the model its own code back, too.

    Args:
        model: a model for conditional generation, on one device.
        processor: transformers' processor with `tokenizer`, `image_processor` and, for `add`, a chat template.
        cache: "dynamic" grows; "static" allocates `capacity` tokens; or an empty cache of transformers.
        capacity: tokens that a static cache holds.
        kernels: whether `patch` is called on the model while a conversation is open.

    Attributes:
        ids: all token ids so far, fed or pending.

    Raises:
        TypeError, ValueError: the model cannot be continued (no M-RoPE to follow, layers that are no attention), with
            the reason; an unknown cache; a static one without capacity.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        cache: Any = "dynamic",
        capacity: int | None = None,
        kernels: bool = True,
    ) -> None:
        require_flag("kernels", kernels)
        for part in ("tokenizer", "image_processor"):
            if getattr(processor, part, None) is None:
                raise TypeError(f"processor is a {type(processor).__name__} without {part}; give the model's processor")
        self._family = Family.of(model)
        self.model, self.processor = model, processor
        self._fed: Fed | None = Fed(model, self._family, cache, capacity)
        self._look = Pictures(model, processor.image_processor, kernels)
        self._messages = Messages(processor)
        self._pictures: list[_Picture] = []
        self._busy = threading.Lock()
        self._shared = Shared.of(model)
        self._release = self._shared.join(self, kernels)
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        """Tokens in the cache, which is the slot of the next one."""
        return self._open.length

    @property
    def next_position(self) -> int:
        """M-RoPE position of the next token that is fed; since the first image it is not its slot."""
        return self._open.next_position

    @property
    def fed(self) -> dict[str, int]:
        """Counts of what has passed the model: "tokens" (language model) and "patches" (vision tower)."""
        return dict(self._open.counts)

    @property
    def images(self) -> list[Tensor]:
        """The decoded pictures, uint8 [height, width, 3], in the order of the conversation."""
        return [picture.pixels for picture in self._pictures]

    def append(self, text: str | None = None, image: Any = None) -> None:
        """Append an image, wrapped in its start and end tokens, then a text as it stands; nothing is fed yet.

        Args:
            text: special tokens in it are recognised.
            image: what `decode_image` takes.

        Raises:
            TypeError, ValueError: nothing given, an unreadable image, image or video tokens in the text.
        """
        with self._alone():
            if text is None and image is None:
                raise ValueError("append was given neither text nor image; give one of them")
            ids = [] if text is None else self._messages.encode(text)
            if {self._family.image, self._family.video} & set(ids):
                raise ValueError("the text contains image or video tokens; pass pictures as image=")
            if image is not None:
                self._take(decode_image(image))
            self.ids += ids

    def crop(self, box: Sequence[float], image: int = -1, coordinates: str = "pixels") -> tuple[int, int, int, int]:
        """Append a crop of an earlier image, cut from its decoded original; returns the box in that image's pixels.

        Args:
            box: (left, top, right, bottom). image: its number in `images`; default: the last one.
            coordinates: "pixels" of the original; "relative", 0 … 1; "thousandths", 0 … 1000, as Qwen3-VL writes them;
                "resized", pixels of the image as the model saw it, as Qwen2.5-VL writes them.

        Raises:
            ValueError: an unknown image or kind of coordinates; a box that is empty or leaves the image.
        """
        with self._alone():
            cut, whole = self._cut(box, image, coordinates)
            self._take(cut)
            return whole

    def cut(
        self, box: Sequence[float], image: int = -1, coordinates: str = "pixels", clip: bool = False
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Return a crop's pixels, uint8 [height, width, 3], and its box in pixels, without appending it; as `crop`.

        clip: cut off what lies outside the image and exchange borders in the wrong order instead of raising.
        """
        require_flag("clip", clip)
        with self._alone():
            return self._cut(box, image, coordinates, clip)

    def add(self, messages: Sequence[Mapping[str, Any]], *, resync: bool = False, **template: Any) -> None:
        """Append messages in the format of chat templates, and the header of the next answer; nothing is fed yet.

        Answers of `generate` enter the history by themselves; a first message of role "assistant" stands in for the
        last one. The template is applied to the whole history, and its ids must begin with those that are there.

        Args:
            messages: dictionaries with "role" and "content", a text or a list of {"type": "text", "text": …} and
                {"type": "image", "image": what `decode_image` takes}.
            resync: where the template writes the history differently, forget from the first different token on and
                feed the rest again instead of raising.
            template: further arguments of `apply_chat_template`, such as `tools`.

        Raises:
            TypeError, ValueError: the template rewrites the history (the first different token is named), other content
                than text and images, a picture that cannot be read. Nothing is appended then.
        """
        require_flag("resync", resync)
        with self._alone():
            history, new = self._messages.joined(messages, self.ids)
            pictures = self._pictures + [self._seen(decode_image(image)) for image in new]
            ids = self._messages.encode(self._messages.rendered(history, template))
            ids, spans = expanded(ids, self._family.image, [self._family.count(p.grid) for p in pictures])
            self._reconcile(ids, resync)
            self.ids, self._pictures = ids, pictures
            for picture, span in zip(pictures, spans, strict=True):
                picture.span = span
            self._messages.accept(history, len(ids))

    def generate(self, **arguments: Any) -> Any:
        """Feed what is pending and generate; takes and returns what the model's `generate` does.

        The sequences returned begin with all ids of the conversation. One sequence, greedy or sampled; streamers,
        stopping criteria and logits processors work as usual. After an error or an interruption the conversation is as
        it was before.

        Raises:
            ValueError: nothing to answer, arguments that follow from the conversation, beams or several sequences, a
                static cache that is too small. Nothing is fed then.
        """
        with self._alone():
            self._check(arguments)
            pending = [picture for picture in self._pictures if picture.span.start >= self.length]
            with self._shared.lock, self._open.undone_on_error(), torch.no_grad():
                inputs = [picture.inputs or self._look.inputs(picture.pixels) for picture in pending]
                names = ("pixel_values", "image_grid_thw") if pending else ()
                pixels = {name: torch.cat([given[name] for given in inputs]) for name in names}
                out = self._open.generate(self.ids, arguments, Pending([picture.grid for picture in pending], pixels))
            self.ids += getattr(out, "sequences", out)[0, len(self.ids) :].tolist()
            for picture in pending:
                picture.inputs = None
            return out

    def close(self) -> None:
        """Give the cache and the pictures back, and the model its own code once no conversation is open; idempotent."""
        self._fed, self._pictures = None, []
        self._release()

    def __enter__(self) -> LiveConversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _open(self) -> Fed:
        if self._fed is None:
            raise ValueError("the conversation is closed: open a new one")
        return self._fed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise ValueError("the conversation is busy in another call: wait for it, or open one per thread")
        try:
            _ = self._open
            yield
        finally:
            self._busy.release()

    def _seen(self, pixels: Tensor) -> _Picture:
        return _Picture(pixels, *self._look.prepared(pixels))

    def _take(self, pixels: Tensor) -> None:
        picture = self._seen(pixels)
        begin, count = len(self.ids) + 1, self._family.count(picture.grid)
        picture.span = range(begin, begin + count)
        self._pictures.append(picture)
        self.ids += [self._family.start, *[self._family.image] * count, self._family.end]

    def _cut(
        self, box: Sequence[float], image: int, coordinates: str, clip: bool = False
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        count = len(self._pictures)
        if type(image) is not int or not -count <= image < count:
            raise ValueError(
                f"image is {shown(image)}; the conversation has {count} images: give 0 … {count - 1}, or add one"
            )
        picture = self._pictures[image]
        height, width = picture.pixels.shape[:2]
        whole = box_in_pixels(box, (height, width), coordinates, self._look.resized(picture.grid), clip)
        left, top, right, bottom = whole
        return picture.pixels[top:bottom, left:right].contiguous(), whole

    def _reconcile(self, ids: list[int], resync: bool) -> None:
        """Cut back to what the ids share with those that are there; raises ValueError if that is less, unasked."""
        settled = self.ids[: self.length] if self._messages.unanswered(self.ids) else self.ids
        pairs = zip(settled, ids, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(settled), len(ids)))
        if same == len(settled):
            return
        if not resync:
            show = self.processor.tokenizer.convert_ids_to_tokens
            new = show(ids[same]) if same < len(ids) else "nothing"
            raise ValueError(
                f"the template writes the history differently from token {same} on: {show(self.ids[same])!r} is there, "
                f"{new!r} would be; pass resync=True to feed the conversation again from there, or go on with append()"
            )
        inside = next((picture.span.start for picture in self._pictures if same in picture.span), same)
        self._open.truncate(inside)

    def _check(self, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError for what `generate` cannot be asked here."""
        if not self.ids or len(self.ids) == self.length:
            raise ValueError("there is nothing to answer: add() or append() something first")
        if self._pictures and len(self.ids) - 1 in self._pictures[-1].span:
            raise ValueError("the conversation ends inside an image: append a text first")
        new = _most_new_tokens(arguments, self.model.generation_config)
        self._open.check_capacity(len(self.ids) + new - 1)


def _most_new_tokens(arguments: Mapping[str, Any], usual: Any) -> int:
    """Return how many tokens `generate` may add; raise ValueError for arguments that a live cache excludes.

    usual: the model's own generation_config.
    """
    if given := sorted(set(_OURS) & set(arguments)):
        raise ValueError(f"{', '.join(given)} follow from the conversation: leave them out")
    own = arguments.get("generation_config")
    if own is not None:
        from transformers import GenerationConfig

        require_type("generation_config", own, GenerationConfig, "a GenerationConfig")

    def asked(name: str) -> Any:
        """Return what `generate` finds: what a call leaves open its generation_config says, and then the model's."""
        if name in arguments:
            return arguments[name]
        return next((value for config in (own, usual) if (value := getattr(config, name, None)) is not None), None)

    for name in ("num_beams", "num_return_sequences"):
        if (value := asked(name) or 1) != 1:
            raise ValueError(f"{name} is {value}, and a live cache holds one sequence: ask once per answer")
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if asked(name) is not None:
            raise ValueError(f"{name} cuts tokens off the cache that the conversation counts: leave it out")
    if asked("use_cache") is False:
        raise ValueError("use_cache of the generation_config is False, and a conversation is its cache: set it to True")
    if asked("prefill_chunk_size") is not None:
        raise ValueError(
            "prefill_chunk_size feeds a conversation from its beginning, over what its cache holds: leave it out"
        )
    new = asked("max_new_tokens")
    return 1 if new is None else require_integer("max_new_tokens", new, 1)
