"""What a live conversation must know of a model of transformers: its image tokens, its positions, its cache.

Everything is asked of the model itself. A model whose answers do not allow a cache to be continued is refused in words.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpt_kernels.checks import require_integer, shown

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose state is keys and values; any other kind carries a state that a chunk cannot continue."""


@dataclass(frozen=True)
class Family:
    """A model with M-RoPE whose cache can be continued.

    Attributes:
        core: the module with `get_rope_index` and `rope_deltas`. image, video: token ids of one visual token.
        start, end: token ids around an image. merge: side of the block of patches that becomes one token.
    """

    core: Any
    image: int
    video: int | None
    start: int
    end: int
    merge: int

    @classmethod
    def of(cls, model: Any) -> Family:
        """Return the family of `model`; raises TypeError or ValueError with the reason where it cannot be followed."""
        if not isinstance(model, nn.Module) or not callable(getattr(model, "generate", None)):
            raise TypeError(f"model is a {type(model).__name__}; give a generating model of transformers")
        name, config, device = type(model).__name__, cast(Any, model.config), cast(torch.device, model.device)
        if device.type == "meta":
            raise ValueError(f"{name} is on the meta device, where nothing is computed: move it to a CPU or a GPU")
        core = next((m for m in model.modules() if hasattr(m, "get_rope_index") and hasattr(m, "rope_deltas")), None)
        if core is None:
            raise ValueError(f"{name} has no get_rope_index with rope_deltas: its positions are no M-RoPE to follow")
        text = config.get_text_config()
        other = sorted(set(getattr(text, "layer_types", None) or ()) - set(ATTENTION))
        if other:
            raise ValueError(
                f"{name} has layers of {', '.join(other)}: their state holds no rows per token, so that a chunk of "
                "several tokens does not continue it exactly; use a model whose layers are all attention"
            )
        start, end = (
            _first(config, *names)
            for names in (
                ("vision_start_token_id", "image_start_token_id"),
                ("vision_end_token_id", "image_end_token_id"),
            )
        )
        image, merge = _first(config, "image_token_id"), getattr(config.vision_config, "spatial_merge_size", None)
        if start is None or end is None or image is None or merge is None:
            raise ValueError(
                f"{name}'s configuration does not name an image's tokens (start {start}, image {image}, end {end}) and "
                f"spatial_merge_size ({merge})"
            )
        family = cls(core, image, _first(config, "video_token_id"), start, end, merge)
        family._prove_additive(name)
        return family

    def positions(self, ids: Sequence[int], grids: Sequence[Sequence[int]], start: int) -> tuple[Tensor, list[int]]:
        """Return M-RoPE positions int64 [3, T] of a chunk that begins at position `start`, and the position behind each
        token.

        grids: (frames, rows, columns) in patches, one per image of the chunk.
        """
        tokens = torch.tensor([list(ids)], device="cpu")
        if grids:
            given = {"image_grid_thw": torch.tensor([list(grid) for grid in grids], device="cpu")}
            positions, _ = self.core.get_rope_index(tokens, **given, **self.kinds(tokens))
            positions = positions[:, 0] + start
        else:
            positions = torch.arange(start, start + len(ids), device="cpu").expand(3, -1)
        behind = (positions.amax(0).cummax(0).values + 1).tolist()
        return positions.to(self.core.device), behind

    @contextmanager
    def deltas(self, delta: int) -> Iterator[None]:
        """Yield the model's own state of positions, which is added to a slot to give the position; restore it
        afterwards.
        """
        before = self.core.rope_deltas
        self.core.rope_deltas = torch.full((1, 1), delta, device=self.core.device)
        try:
            yield
        finally:
            self.core.rope_deltas = before

    def kinds(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the argument that tells a model's text from its images, for ids [1, T]."""
        return {"mm_token_type_ids": (tokens == self.image).int()}

    def count(self, grid: Sequence[int]) -> int:
        """Return how many visual tokens an image of (frames, rows, columns) patches is."""
        frames, rows, columns = grid
        return frames * rows * columns // self.merge**2

    def _prove_additive(self, name: str) -> None:
        """Check that a chunk's positions are those of the whole conversation, on two images with text between."""
        grids = [(1, 4 * self.merge, 2 * self.merge), (1, 2 * self.merge, 6 * self.merge)]
        pieces = [[0, self.start, *[self.image] * self.count(grid), self.end, 0, 0] for grid in grids]
        try:
            whole, _ = self.positions(sum(pieces, []), grids, 0)
            first, behind = self.positions(pieces[0], grids[:1], 0)
            second, _ = self.positions(pieces[1], grids[1:], behind[-1])
        except Exception as error:
            raise ValueError(
                f"{name}.get_rope_index cannot be followed ({type(error).__name__}: {error}); "
                "use a family whose signature is that of Qwen2-VL"
            ) from error
        if whole.shape[0] != 3 or not torch.equal(torch.cat([first, second], dim=1), whole):
            raise ValueError(
                f"{name}: positions of an image depend on more than the position before it, so that a cache cannot be "
                "continued by chunks; use a family of Qwen2-VL's kind"
            )


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def new_cache(model: Any, cache: Any, capacity: int | None) -> Any:
    """Return an empty cache for `model`: "dynamic", "static" with room for `capacity` tokens, or the one that is
    given.
    """
    from transformers import Cache, DynamicCache, StaticCache

    text, kind = model.config.get_text_config(), cache if isinstance(cache, str) else None
    if capacity is not None and kind != "static":
        raise ValueError(
            f"capacity is {shown(capacity)}, and only a static cache has one: pass cache='static' or leave it out"
        )
    if kind == "dynamic":
        return DynamicCache(config=text)
    if kind == "static":
        if capacity is None:
            raise ValueError("capacity is None; a static cache needs a number of tokens")
        with model.device:
            return StaticCache(config=text, max_cache_len=require_integer("capacity", capacity, 1, 1 << 31))
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is {shown(cache)}; give 'dynamic', 'static' or a cache of transformers")
    if cache_length(cache):
        raise ValueError(f"the cache holds {cache_length(cache)} tokens; a conversation begins with an empty one")
    return cache


def cache_argument(model: nn.Module) -> str:
    """Return the name under which `model` takes its cache: from transformers 5.24 on it is "cache"."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def capacity_of(cache: Any) -> int | None:
    """Return how many tokens a cache of fixed size holds, or None for one that grows."""
    return min((layer.max_cache_len for layer in cache.layers if type(layer).__name__ == "StaticLayer"), default=None)


def cache_length(cache: Any) -> int:
    """Return how many tokens a cache of transformers holds."""
    return int(cache.get_seq_length())


def truncate(cache: Any, length: int) -> None:
    """Forget the tokens from `length` on, in every layer that holds more.

    Raises:
        ValueError: a layer keeps a window only, or a kind of state that cannot be shortened; nothing is changed.
    """
    layers = [layer for layer in cache.layers if getattr(layer, "is_initialized", True)]
    for layer in layers:
        if getattr(layer, "is_sliding", False) and int(layer.get_seq_length()) > length:
            raise ValueError(f"a {type(layer).__name__} keeps a window only and cannot be cut back to {length} tokens")
    for layer in layers:
        excess = int(layer.get_seq_length()) - length
        if excess <= 0:
            continue
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)
        else:
            layer.crop(-excess)
