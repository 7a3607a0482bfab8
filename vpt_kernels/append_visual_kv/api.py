"""RMSNorm and M-RoPE rotation of new tokens, and their append to a KV cache, in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from vpt_kernels.backends import bind, call
from vpt_kernels.checks import (
    CHECK_VALUES,
    require_choice,
    require_disjoint,
    require_flag,
    require_inference,
    require_integer,
    require_number,
    require_slots,
    require_tensor,
    require_type,
    shown,
)

LAYOUTS = ("NHD", "HND")
FLOAT8 = torch.float8_e4m3fn
MOST_POSITIONS = 1 << 24
"""From here on float32 has no number of its own for each position."""
_INTEGERS = (torch.int32, torch.int64)
_IN_PYTHON = ("triton", "reference")
"""Implementations that leave it to us to compare addresses; the others do it where that costs nanoseconds."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def rotary_table(
    max_positions: int, rotary_dim: int, theta: float = 1e6, device: torch.device | str | None = None
) -> Tensor:
    """Return the cos and sin of every position: float32 [max_positions, rotary_dim], cosines in the first half.

    Source: default rotary embedding of transformers (float32 frequencies θ^(−2i/rotary_dim)).

    Raises:
        ValueError: rotary_dim is odd, a size is not positive, or the table has more than 2³¹ numbers.
    """
    max_positions = require_integer("max_positions", max_positions, 1, MOST_POSITIONS)
    rotary_dim = require_integer("rotary_dim", rotary_dim, 2, 1 << 31)
    require_number("theta", theta, positive=True)
    require_type("device", device, (torch.device, str, type(None)), "a torch.device, its name, or None for the CPU")
    if rotary_dim % 2 or max_positions * rotary_dim > 1 << 31:
        raise ValueError(
            f"rotary_dim is {rotary_dim}, max_positions {max_positions}; rotary_dim must be even, and their product at "
            "most 2^31"
        )
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rotary_dim
    angles = torch.arange(max_positions, device="cpu").float()[:, None] * (1.0 / theta**exponents)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    try:
        return table.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def prepare(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sections: tuple[int, int, int] = (16, 24, 24),
    *,
    interleaved: bool = False,
    layout: str = "NHD",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """Check a call of `form`, one of the two public functions.

    Returns:
        The implementation that `backend` chooses, and its arguments in the order of the schema.
    """
    require_flag("interleaved", interleaved)
    _check_tokens(q, k, v)
    _check_rotation(k, cos_sin, positions, slots, sections)
    if k_scale is not None and v_scale is not None:
        k_cache, v_cache = _as_float8(k_cache), _as_float8(v_cache)
    _check_caches(k, k_cache, v_cache, layout, k_scale, v_scale)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            _check_norm(name, norm, k, norm_eps)
    rows = (("q", q), ("k", k), ("v", v), ("cos_sin", cos_sin), ("k_cache", k_cache), ("v_cache", v_cache))
    for name, tensor in rows:
        if not tensor.is_contiguous() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last dimension must be contiguous")
        if tensor.requires_grad:
            require_inference(**{name: tensor})
    if CHECK_VALUES and not torch.compiler.is_compiling():
        _check_values(k, cos_sin, positions, slots, k_cache)
    op = bind("append_visual_kv", form, backend, q.device, q.dtype)
    if op._overloadname in _IN_PYTHON:
        written: dict[str, Tensor] = {"k_cache": k_cache, "v_cache": v_cache}
        read: dict[str, Tensor | None] = {"k": k, "v": v, "cos_sin": cos_sin, "positions": positions, "slots": slots}
        read |= {"k_scale": k_scale, "v_scale": v_scale, "q_norm": q_norm, "k_norm": k_norm}
        if form == "append_visual_kv_":
            written["q"] = q
        else:
            read["q"] = q
        require_disjoint(written, read)
    arguments = (q, k, v, cos_sin, positions, slots, k_cache, v_cache, *sections, interleaved, layout == "HND")
    return op, (*arguments, k_scale, v_scale, q_norm, k_norm, norm_eps)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    require_tensor("q", q, None, None, 3)
    require_tensor("k", k, q.dtype, q.device, 3)
    require_tensor("v", v, q.dtype, q.device, 3)
    (tokens, q_heads, width), (rows, kv_heads, head_dim) = q.shape, k.shape
    if tokens != rows or width != head_dim or v.shape != k.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [tokens, heads, head_dim] with equal "
            "tokens and head_dim, and k like v"
        )
    if not kv_heads or not head_dim or q_heads % kv_heads:
        raise ValueError(f"q has {q_heads} heads, not a multiple of the {kv_heads} key/value heads")


def _check_rotation(
    k: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor, sections: tuple[int, int, int]
) -> None:
    device = k.device
    require_tensor("cos_sin", cos_sin, torch.float32, device, 2)
    require_tensor("positions", positions, None, device, 2)
    require_tensor("slots", slots, None, device, 1)
    if positions.dtype not in _INTEGERS or slots.dtype not in _INTEGERS:
        raise TypeError(f"positions are {positions.dtype}, slots {slots.dtype}; both must be int32 or int64")
    (tokens, _, head_dim), (axes, columns) = k.shape, positions.shape
    if axes != 3 or columns != tokens or slots.shape[0] != tokens:
        raise ValueError(
            f"positions {tuple(positions.shape)} and slots {tuple(slots.shape)} must be (3, {tokens}) and ({tokens},), "
            "one column per token (rows of positions: temporal, height, width)"
        )
    rows, rotary_dim = cos_sin.shape
    if not isinstance(sections, (tuple, list)) or not all([isinstance(part, int) for part in sections]):
        raise TypeError(f"sections is {shown(sections)}; it must be three integers")
    if len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != rotary_dim or rotary_dim > head_dim:
        raise ValueError(
            f"sections {tuple(sections)} must be three counts that sum to half of the table's rotary_dim {rotary_dim}, "
            f"and rotary_dim must be at most head_dim {head_dim}"
        )
    if tokens and rotary_dim and not rows:
        raise ValueError(f"the cos_sin table is empty, and {tokens} tokens read it: build a longer table")


def _as_float8(cache: Tensor) -> Tensor:
    """Return pages of bytes, as vLLM and FlashInfer keep float8, as the float8 that they are."""
    return cache.view(FLOAT8) if isinstance(cache, Tensor) and cache.dtype == torch.uint8 else cache


def _check_caches(
    k: Tensor, k_cache: Tensor, v_cache: Tensor, layout: str, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    require_choice("layout", layout, LAYOUTS)
    kind = _cache_dtype(k, k_cache)
    require_tensor("k_cache", k_cache, kind, k.device, None)
    require_tensor("v_cache", v_cache, kind, k.device, None)
    _, kv_heads, head_dim = k.shape
    shape, heads_at = k_cache.shape, -2 if layout == "NHD" else -3
    if len(shape) not in (3, 4) or shape[heads_at] != kv_heads or shape[-1] != head_dim or shape != v_cache.shape:
        row = f"{kv_heads}, {head_dim}"
        shapes = f"[capacity, {row}] or [pages, page_size, {row}]"
        if layout == "HND":
            shapes = f"[{kv_heads}, capacity, {head_dim}] or [pages, {kv_heads}, page_size, {head_dim}]"
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must both be {shapes} ({layout})"
        )
    if kind != FLOAT8 and k_scale is None and v_scale is None:
        return
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (kind == FLOAT8) != (scale is not None):
            state = "missing" if scale is None else "given"
            raise ValueError(f"{name} is {state}; scales go with float8_e4m3fn caches, and only with them")
        if scale is None:
            continue
        require_tensor(name, scale, torch.float32, k.device, None)
        if scale.numel() not in (1, kv_heads) or scale.dim() > 1 or not scale.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}; it must be one number or [{kv_heads}], contiguous"
            )


def _cache_dtype(k: Tensor, k_cache: Tensor) -> torch.dtype:
    """Return the dtype that both caches must have: float8 if the keys' is that, else k's."""
    found = getattr(k_cache, "dtype", None)
    if found == torch.uint8:
        raise TypeError(
            "k_cache is torch.uint8; bytes are taken as float8_e4m3fn, which has scales: pass k_scale and v_scale"
        )
    return FLOAT8 if found == FLOAT8 else k.dtype


def _check_norm(name: str, norm: Tensor, k: Tensor, eps: float) -> None:
    require_tensor(name, norm, k.dtype, k.device, 1)
    require_inference(**{name: norm})
    if norm.shape[0] != k.shape[2] or not norm.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(norm.shape)} and strides {norm.stride()}; it must be [{k.shape[2]}], one weight "
            "per channel of a head, contiguous"
        )
    if not isinstance(eps, (int, float)):
        raise TypeError(f"norm_eps is {type(eps).__name__}; it must be a number")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"norm_eps is {eps}; it must be finite and not negative")


def _check_values(k: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    tokens, kv_heads, head_dim = k.shape
    require_slots("slots", slots, k_cache.numel() // (kv_heads * head_dim))
    if tokens and not 0 <= int(positions.min()) <= int(positions.max()) < cos_sin.shape[0]:
        raise ValueError(
            f"positions span {int(positions.min())}..{int(positions.max())}; the cos_sin table has rows "
            f"0..{cos_sin.shape[0] - 1}: build a longer table"
        )


def _takes_the_arguments_of(
    source: Callable[Concatenate[str, _Arguments], Any],
) -> Callable[[Callable[..., _Result]], Callable[_Arguments, _Result]]:
    """Give a function of any arguments the signature of `source` behind its first parameter, and keep its result."""

    def signed(function: Callable[..., _Result]) -> Callable[_Arguments, _Result]:
        _, *parameters = inspect.signature(source).parameters.values()
        result = inspect.signature(function).return_annotation
        function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
        return function

    return signed


@_takes_the_arguments_of(prepare)
def append_visual_kv(*arguments: Any, **options: Any) -> Tensor:
    """Rotate q and k by M-RoPE and write k and v into the caches at `slots`, in place; return the rotated q.

    Where a token is stored (its slot) and where it is (its position) are separate inputs.

    Args:
        q: [T, query heads, head_dim]; k, v: [T, kv heads, head_dim], same dtype; views into a packed GEMM output
            are fine (any strides, last dimension contiguous). k and v are not changed.
        cos_sin: float32 [max_positions, rotary_dim] from `rotary_table`; channels ≥ rotary_dim pass through.
        positions: int32 or int64 [3, T], rows temporal, height, width, each in 0…max_positions − 1.
        slots: int32 or int64 [T], cache row of each token; < 0 or ≥ capacity: q is rotated, nothing is stored.
            Equal slots: one of the tokens wins, per element.
        k_cache, v_cache: "NHD": [capacity, kv heads, head_dim] or [pages, page_size, kv heads, head_dim]; "HND":
            [kv heads, capacity, head_dim] or [pages, kv heads, page_size, head_dim]. Slot s of a paged cache is row
            s mod page_size of page s div page_size. Any strides, k's and v's independent, last dimension contiguous;
            dtype of k, or both float8_e4m3fn. uint8 with scales is taken as float8_e4m3fn. The caches share memory
            neither with each other nor with an input; views of one allocation that do not overlap are fine.
        sections: half-dimensions rotated by the temporal, height and width position; they sum to rotary_dim / 2.
        interleaved: False: sections are chunks in this order (Qwen2-VL); True: t h w t h w … (Qwen3-VL).
        layout: "NHD" or "HND", the order of rows (N), heads (H) and head_dim (D) in the caches.
        k_scale, v_scale: float32, one number or one per kv head, with float8 caches only: what is stored is x / scale,
            rounded once and saturated to ±448.
        q_norm, k_norm: weights [head_dim] of an RMSNorm of every head of q, of k, before the rotation, in their dtype:
            weight · x / √(mean(x²) + norm_eps), rounded where transformers' RMSNorm rounds. None: not normalised. A
            zero-centred norm passes 1 + weight.
        norm_eps: added to the mean of squares.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        The rotated q, a new contiguous [T, query heads, head_dim]. The rotation is computed in float32, rounded once.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shapes, strides or device, memory that overlaps; on the CPU also a position outside the table
            (on a GPU it is clamped: reading it would need a synchronisation). The caches are untouched after an error.
        BackendUnavailable: an explicit backend cannot run here.

    Source: `apply_multimodal_rotary_pos_emb` of transformers' Qwen2-VL, `apply_interleaved_mrope` and
    `Qwen3VLTextRMSNorm` of its Qwen3-VL, and their cache update.
    """
    op, checked = prepare("append_visual_kv", *arguments, **options)
    return call(op, *checked)


@_takes_the_arguments_of(prepare)
def append_visual_kv_(*arguments: Any, **options: Any) -> None:
    """Do what `append_visual_kv` does, but rotate q in place (q may be a view of the packed GEMM output); return
    nothing.

    q must not share memory with another input.
    """
    op, checked = prepare("append_visual_kv_", *arguments, **options)
    call(op, *checked)
