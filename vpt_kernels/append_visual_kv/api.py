"""M-RoPE rotation and append of new tokens to a KV cache, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_kernels.backends import bind
from vpt_kernels.checks import CHECK_VALUES, require_inference, require_slots, require_tensor

LAYOUTS = ("NHD", "HND")
_INTEGERS = (torch.int32, torch.int64)


def rotary_table(
    max_positions: int, rotary_dim: int, theta: float = 1e6, device: torch.device | str | None = None
) -> Tensor:
    """cos and sin of every position: float32 [max_positions, rotary_dim], cosines in the first half.

    Source: default rotary embedding of transformers (float32 frequencies θ^(−2i/rotary_dim)).

    Raises:
        ValueError: rotary_dim is odd, or a size is not positive.
    """
    if max_positions < 1 or rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"max_positions {max_positions} must be positive, rotary_dim {rotary_dim} positive and even")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    angles = torch.arange(max_positions).float()[:, None] * (1.0 / theta**exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sections: tuple[int, int, int],
    layout: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    require_tensor("q", q, None, None, 3)
    dtype, device = q.dtype, q.device
    for name, tensor, kind, dim in (
        ("k", k, dtype, 3),
        ("v", v, dtype, 3),
        ("cos_sin", cos_sin, torch.float32, 2),
        ("positions", positions, None, 2),
        ("slots", slots, None, 1),
    ):
        require_tensor(name, tensor, kind, device, dim)
    tokens, kv_heads, head_dim = k.shape
    if v.shape != k.shape or q.shape[0] != tokens or q.shape[2] != head_dim:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [tokens, heads, head_dim] with equal "
            "tokens and head_dim, and k like v"
        )
    if not kv_heads or not head_dim or q.shape[1] % kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the {kv_heads} key/value heads")
    if positions.dtype not in _INTEGERS or slots.dtype not in _INTEGERS:
        raise TypeError(f"positions are {positions.dtype}, slots {slots.dtype}; both must be int32 or int64")
    if tuple(positions.shape) != (3, tokens) or slots.shape[0] != tokens:
        raise ValueError(
            f"positions {tuple(positions.shape)} and slots {tuple(slots.shape)} must be (3, {tokens}) and ({tokens},), "
            "one column per token (rows of positions: temporal, height, width)"
        )
    rotary_dim = cos_sin.shape[1]
    if len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != rotary_dim or rotary_dim > head_dim:
        raise ValueError(
            f"sections {tuple(sections)} must be three counts that sum to half of the table's rotary_dim {rotary_dim}, "
            f"and rotary_dim must be at most head_dim {head_dim}"
        )
    _check_caches(k, k_cache, v_cache, layout, k_scale, v_scale)
    strided = {"q": q, "k": k, "v": v, "cos_sin": cos_sin, "k_cache": k_cache, "v_cache": v_cache}
    for name, tensor in strided.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last dimension must be contiguous")
    require_inference(**strided)
    if CHECK_VALUES and not torch.compiler.is_compiling():
        capacity = k_cache.numel() // (kv_heads * head_dim)
        require_slots("slots", slots, capacity)
        if tokens and not 0 <= int(positions.min()) <= int(positions.max()) < cos_sin.shape[0]:
            raise ValueError(
                f"positions span {int(positions.min())}..{int(positions.max())}; the cos_sin table has rows "
                f"0..{cos_sin.shape[0] - 1}: build a longer table"
            )


def _check_caches(
    k: Tensor, k_cache: Tensor, v_cache: Tensor, layout: str, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose one of {LAYOUTS}")
    _, kv_heads, head_dim = k.shape
    require_tensor("k_cache", k_cache, None, None, None)
    quantised = k_cache.dtype == torch.float8_e4m3fn
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require_tensor(name, cache, torch.float8_e4m3fn if quantised else k.dtype, k.device, None)
    heads_at = -2 if layout == "NHD" else -3
    if k_cache.dim() not in (3, 4) or k_cache.shape != v_cache.shape:
        fits = False
    else:
        fits = k_cache.shape[heads_at] == kv_heads and k_cache.shape[-1] == head_dim
    if not fits:
        row = f"{kv_heads}, {head_dim}"
        shapes = f"[capacity, {row}] or [pages, page_size, {row}]"
        if layout == "HND":
            shapes = f"[{kv_heads}, capacity, {head_dim}] or [pages, {kv_heads}, page_size, {head_dim}]"
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must both be {shapes} ({layout})"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if quantised != (scale is not None):
            state = "missing" if scale is None else "given"
            raise ValueError(f"{name} is {state}; scales go with float8_e4m3fn caches, and only with them")
        if scale is None:
            continue
        require_tensor(name, scale, torch.float32, k.device, None)
        if scale.numel() not in (1, kv_heads) or scale.dim() > 1 or not scale.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}; it must be one number or [{kv_heads}], contiguous"
            )


def append_visual_kv(
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
    backend: str = "auto",
) -> Tensor:
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
            dtype of k, or both float8_e4m3fn.
        sections: half-dimensions rotated by the temporal, height and width position; they sum to rotary_dim / 2.
        interleaved: False: sections are chunks in this order (Qwen2-VL); True: t h w t h w … (Qwen3-VL).
        layout: "NHD" or "HND", the order of rows (N), heads (H) and head_dim (D) in the caches.
        k_scale, v_scale: float32, one number or one per kv head, with float8 caches only: what is stored is x / scale,
            rounded once and saturated to ±448.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        The rotated q, a new contiguous [T, query heads, head_dim]. The rotation is computed in float32, rounded once.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shapes, strides or device; on the CPU also a position outside the table (on a GPU it is
            clamped: reading it would need a synchronisation). The caches are untouched after an error.
        BackendUnavailable: an explicit backend cannot run here.

    Source: `apply_multimodal_rotary_pos_emb` of transformers' Qwen2-VL, `apply_interleaved_mrope` of its Qwen3-VL,
    and their cache update.
    """
    _check(q, k, v, cos_sin, positions, slots, k_cache, v_cache, sections, layout, k_scale, v_scale)
    op = bind("append_visual_kv", "append_visual_kv", backend, q.device, q.dtype)
    options = (*sections, interleaved, layout == "HND", k_scale, v_scale)
    try:
        return op(q, k, v, cos_sin, positions, slots, k_cache, v_cache, *options)
    except RuntimeError as error:
        raise _as_value_error(error) from None


def append_visual_kv_(
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
    backend: str = "auto",
) -> None:
    """`append_visual_kv` that rotates q in place (q may be a view of the packed GEMM output) and returns nothing."""
    _check(q, k, v, cos_sin, positions, slots, k_cache, v_cache, sections, layout, k_scale, v_scale)
    op = bind("append_visual_kv", "append_visual_kv_", backend, q.device, q.dtype)
    options = (*sections, interleaved, layout == "HND", k_scale, v_scale)
    try:
        op(q, k, v, cos_sin, positions, slots, k_cache, v_cache, *options)
    except RuntimeError as error:
        raise _as_value_error(error) from None


def _as_value_error(error: RuntimeError) -> Exception:
    """The backends find positions outside the table while they read them; a caller expects ValueError."""
    text = str(error)
    start = text.find("positions span")
    return ValueError(text[start:].splitlines()[0]) if start >= 0 else error
