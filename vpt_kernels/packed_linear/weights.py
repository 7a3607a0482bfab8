"""Weights of linear layers in panels of 16 rows, in the precision in which they are stored."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vpt_kernels.checks import require_choice, require_flag, require_integer, require_tensor, require_type, shown
from vpt_kernels.packed_linear import int4
from vpt_kernels.packed_linear.int4 import GROUP

STORED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.int32,
    "w8a8": torch.int8,
}
"""Precisions of a packed weight, and the dtype of its panels: int4 has eight columns in an int32."""
FLOATS = tuple(dtype for dtype in STORED.values() if dtype.is_floating_point)
PANEL = 16
"""Rows of a weight that lie side by side; `kPanel` in csrc/cpu/packed_linear.h."""
_GATE = PANEL // 2
_INTEGERS = {2: torch.int16, 4: torch.int32}
_ROWS_AT_ONCE = 64 * PANEL
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The weight of a linear layer as `packed_linear` reads it; made by `pack_weight`.

    Attributes:
        data: [panels, ⌈K/2⌉, 32] in the stored dtype. A panel holds 16 rows; float32 and float16 have column 2i of all,
            then column 2i + 1 of all, bfloat16 and int8 both columns of a row side by side. Zero where the weight ends.
            int4: int32 [panels, ⌈K/8⌉, 16], eight columns of a row in each.
        scales: float32 [panels, 1 or ⌈K/32⌉, 16] of int8 weights, one number per row or per 32 columns of a row; of
            int4 weights float16 [panels, ⌈K/64⌉, 32], those of columns 64i … 64i + 31 of all rows, then those of
            the next 32; else None.
        in_features: K, columns of the weight.
        out_features: columns of the product: rows of the weight, half of them where it is gated.
        gated: Every panel holds eight rows of the gate and the same eight rows of what it multiplies.
        minima: of int4 weights, as their scales: a weight is scale·integer + minimum; else None.
        dynamic: x may be rounded to 8 bits as well, where the processor multiplies bytes faster ("w8a8").
    """

    data: Tensor
    scales: Tensor | None
    in_features: int
    out_features: int
    gated: bool
    minima: Tensor | None = None
    dynamic: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the panels: the stored dtype, torch.int32 of int4."""
        return self.data.dtype

    @property
    def precision(self) -> str:
        """The name by which `pack_weight` makes it: "float32", "bfloat16", "float16", "int8", "int4" or "w8a8"."""
        return "w8a8" if self.dynamic else next(name for name, dtype in STORED.items() if dtype == self.data.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the panels, scales and minima."""
        return sum(part.nbytes for part in (self.data, self.scales, self.minima) if part is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the same weight on another device; ValueError if there is none of this name."""
        require_type("device", device, (torch.device, str), "a torch.device or its name")
        try:
            data = self.data.to(device)
            scales, minima = (None if part is None else part.to(device) for part in (self.scales, self.minima))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        return replace(self, data=data, scales=scales, minima=minima)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers that the product is made of, in the order of the weight's rows: [rows, K] in `dtype`.

        A gated weight gives the gate's rows first. int8 weights are the integer times its scale, int4 weights that plus
        the minimum, rounded to float32.

        Raises:
            TypeError: `dtype` is no floating-point dtype of torch.
        """
        _require_float(dtype)
        rows = _values(self).to(dtype).flatten(0, 1)[..., : self.in_features]
        if not self.gated:
            return rows[: self.out_features].contiguous()
        halves = rows.unflatten(0, (-1, 2, _GATE)).transpose(0, 1).flatten(1, 2)
        return halves[:, : self.out_features].flatten(0, 1)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows `ids`, int64 of any shape, of a weight that is not gated: [*ids.shape, K] in `dtype`.

        An embedding table that is also the head needs no second copy.

        Raises:
            TypeError: ids are no integers, or `dtype` is no floating-point dtype of torch.
            ValueError: The weight is gated, or an id is no row.
        """
        _require_float(dtype)
        require_tensor("ids", ids, None, self.data.device, None)
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids are {ids.dtype}; they must be int32 or int64")
        if self.gated:
            raise ValueError("the weight is gated: its rows are two layers', not a table; pack each for itself")
        flat = ids.flatten().long()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.out_features:
            raise ValueError(f"ids span {int(flat.min())}..{int(flat.max())}; rows are 0..{self.out_features - 1}")
        panel, row = flat // PANEL, flat % PANEL
        if self.scales is not None and self.minima is not None:
            numbers = (_by_group(part)[panel, :, row] for part in (self.scales, self.minima))
            values = int4.dequantise(self.data[panel, :, row], *numbers)[:, : self.in_features]
        else:
            data = _by_row(self.data)
            values = data[panel, :, row] if _side_by_side(data.dtype) else data[panel, :, :, row]
            values = values.flatten(1)[:, : self.in_features]
            if self.scales is not None:
                values = values.float() * _per_column(self.scales[panel, :, row], self.in_features)
        return values.to(dtype).unflatten(0, ids.shape) if ids.dim() else values.to(dtype)[0]


def _require_float(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float64, *FLOATS):
        raise TypeError(f"dtype is {shown(dtype)}; it must be torch.float64 or one of {', '.join(map(str, FLOATS))}")


def _by_row(data: Tensor) -> Tensor:
    """Return panels with their rows as an axis: [P, pairs, 16, 2], or [P, pairs, 2, 16] of float32 and float16."""
    return data.unflatten(2, (PANEL, 2) if _side_by_side(data.dtype) else (2, PANEL))


def _side_by_side(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.int8)


def _per_column(scales: Tensor, columns: int) -> Tensor:
    """Return scales [..., 1 or groups] → [..., 1 or columns]."""
    return scales if scales.shape[-1] == 1 else scales.repeat_interleave(GROUP, -1)[..., :columns]


def _by_group(numbers: Tensor) -> Tensor:
    """Return scales or minima of int4 with their groups as an axis: [P, groups, 16]."""
    return numbers.unflatten(2, (2, PANEL)).flatten(1, 2)


def _values(packed: PackedWeight) -> Tensor:
    """Return panels as the rows they hold: [P, 16, columns or a few more]."""
    data, scales, minima = packed.data, packed.scales, packed.minima
    if scales is not None and minima is not None:
        return int4.dequantise(*(part.transpose(1, 2) for part in (data, _by_group(scales), _by_group(minima))))
    order = (0, 2, 1, 3) if _side_by_side(data.dtype) else (0, 3, 1, 2)
    rows = _by_row(data).permute(order).flatten(2)
    if scales is None:
        return rows
    return rows.float() * _per_column(scales.transpose(1, 2), rows.shape[-1])


def pack_weight(
    weight: Tensor | Sequence[Tensor], dtype: str | None = None, *, gated: bool = False, group_size: int | None = None
) -> PackedWeight:
    """Lay the weight of a linear layer out for `packed_linear`, in its own precision or another.

    Args:
        weight: [N, K] as `nn.Linear` keeps it, float32, bfloat16 or float16, on any device and with any strides; or
            several of equal K and dtype, whose rows follow one another (query, key and value; gate and up). They are
            read once and not kept.
        dtype: "float32", "bfloat16", "float16", "int8", "int4" or "w8a8"; None: the weight's own. int8 is symmetric:
            the integer nearest to w / scale, scale = max |w| / 127 over the row or group. int4: the integer from 0 to
            15 nearest to (w − minimum) / scale, scale = (max w − min w) / 15 over 32 columns of a row, 5 bits a weight.
            w8a8: int8 with a scale per row, and x is rounded to 8 bits too where that is faster (dynamic quantisation).
        gated: The first half of the rows is a gate of the second; `packed_linear` then returns activation(gate)·up.
        group_size: For int8: None, one scale per row, or 32, one per 32 columns of a row. int4 has groups of 32.

    Raises:
        TypeError: An argument is of another type, or the weight of another dtype.
        ValueError: Shapes do not fit, the name of the dtype is unknown, int8 cannot hold a NaN or an infinity, int4
            neither those nor numbers beyond ±65504.
    """
    require_flag("gated", gated)
    parts = _checked(weight, gated)
    if dtype is not None:
        require_choice("dtype", dtype, tuple(STORED))
    stored = parts[0].dtype if dtype is None else STORED[dtype]
    if group_size is not None:
        require_integer("group_size", group_size, GROUP, GROUP)
        if dtype == "w8a8":
            raise ValueError(f"group_size is {group_size} and dtype w8a8, which has a scale per row: leave it out")
        if stored in FLOATS:
            raise ValueError(
                f"group_size is {group_size} and dtype {stored}; only int8 and int4 have scales: leave it out"
            )
    columns, total = parts[0].shape[1], sum(len(part) for part in parts)
    features, width = (total // 2, _GATE) if gated else (total, PANEL)
    panels, groups = -(-features // width), 1 if group_size is None else -(-columns // GROUP)
    device = parts[0].device
    scales: Tensor | None = None
    minima: Tensor | None = None
    if stored == STORED["int4"]:
        data = torch.empty((panels, -(-columns // int4.COLUMNS), PANEL), dtype=stored, device=device)
        shape = (panels, -(-columns // (2 * GROUP)), 2 * PANEL)
        scales, minima = (torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2))
    else:
        data = torch.empty((panels, -(-columns // 2), 2 * PANEL), dtype=stored, device=device)
        if stored == torch.int8:
            scales = torch.empty((panels, groups, PANEL), dtype=torch.float32, device=device)
    _advise_huge_pages(data)
    done = 0
    for rows in _panels(parts, features if gated else None):
        here = slice(done, done + len(rows) // PANEL)
        if scales is not None and minima is not None:
            words, *numbers = int4.quantise(rows.float())
            data[here] = words.unflatten(0, (-1, PANEL)).transpose(1, 2)
            _lay_out(numbers[0], scales[here])
            _lay_out(numbers[1], minima[here])
        else:
            if scales is not None:
                rows, found = _quantise(rows, groups)
                scales[here] = found.unflatten(0, (-1, PANEL)).transpose(1, 2)
            _lay_out(rows.to(stored), data[here])
        done = here.stop
    return PackedWeight(data, scales, columns, features, gated, minima, dtype == "w8a8")


def _advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for pages of 2 MiB where a tensor that nobody has written to covers whole ones.

    One row reads all panels once: the fewer pages, the less time goes into finding them. Nobody need follow the advice.
    """
    # A subclass, such as a fake tensor, need not have memory.
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    whole = (tensor.data_ptr() + tensor.nbytes - first) // _HUGE_PAGE * _HUGE_PAGE
    if whole > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)


def _checked(weight: Tensor | Sequence[Tensor], gated: bool) -> list[Tensor]:
    parts = [weight] if isinstance(weight, Tensor) else weight
    require_type("weight", parts, (list, tuple), "a torch.Tensor or a sequence of them")
    if not parts:
        raise ValueError("weight is an empty sequence; pass at least one tensor")
    for part in parts:
        require_tensor("weight", part, None, None, 2)
        if part.dtype not in FLOATS:
            raise TypeError(f"weight is {part.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
        require_tensor("weight", part, parts[0].dtype, parts[0].device, 2)
        if part.shape[1] != parts[0].shape[1]:
            raise ValueError(f"weights have {parts[0].shape[1]} and {part.shape[1]} columns; all must have as many")
    total = sum(len(part) for part in parts)
    if gated and total % 2:
        raise ValueError(
            f"weight has {total} rows; a gated one must have an even number, the gate's and as many others"
        )
    return [part.detach() for part in parts]


def _rows(parts: Sequence[Tensor], first: int, last: int) -> Tensor:
    """Return the rows first … last − 1 of all parts, one below the other; without a copy where one part holds them."""
    found = []
    for part in parts:
        if first < len(part) and last > 0:
            found.append(part[max(first, 0) : last])
        first, last = first - len(part), last - len(part)
    return found[0] if len(found) == 1 else torch.cat(found)


def _panels(parts: Sequence[Tensor], gate: int | None) -> Iterator[Tensor]:
    """Yield rows in the order of the panels, a multiple of 16 at a time; gate: rows of the gate, if there is one."""
    total = sum(len(part) for part in parts)
    if gate is None:
        for first in range(0, total, _ROWS_AT_ONCE):
            yield _padded(_rows(parts, first, min(total, first + _ROWS_AT_ONCE)), PANEL)
        return
    for first in range(0, gate, _ROWS_AT_ONCE // 2):
        last = min(gate, first + _ROWS_AT_ONCE // 2)
        halves = [_padded(_rows(parts, first + start, last + start), _GATE) for start in (0, gate)]
        yield torch.stack([half.unflatten(0, (-1, _GATE)) for half in halves], 1).flatten(0, 2)


def _padded(rows: Tensor, multiple: int) -> Tensor:
    missing = -len(rows) % multiple
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _quantise(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return integers of `rows` as float32 [n, K], and their scales [n, groups]."""
    wide, columns = rows.float(), rows.shape[1]
    if groups > 1:
        wide = torch.nn.functional.pad(wide, (0, -columns % GROUP)).unflatten(1, (groups, GROUP))
    else:
        wide = wide.unflatten(1, (1, columns))
    scales = wide.abs().amax(-1) / 127 if columns else wide.new_zeros(len(rows), groups)
    if not scales.is_meta and not bool(torch.isfinite(scales).all()):
        raise ValueError("weight has a NaN or an infinity, which int8 cannot hold; keep it in a float dtype")
    integers = (wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round_().clamp_(-127, 127)
    return integers.flatten(1)[:, :columns], scales


def _lay_out(rows: Tensor, panels: Tensor) -> None:
    """Write rows [16·P, K] into panels [P, ⌈K/2⌉, 32] of the same dtype."""
    if not rows.shape[1]:
        return
    if rows.shape[1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    by_panel = rows.unflatten(0, (-1, PANEL))  # [P, 16, 2·pairs]
    if _side_by_side(rows.dtype):
        # Two columns move as one number.
        pair = _INTEGERS[2 * rows.itemsize]
        panels.view(pair).copy_(by_panel.contiguous().view(pair).transpose(1, 2))
    else:
        panels.unflatten(2, (2, PANEL)).flatten(1, 2).copy_(by_panel.transpose(1, 2))
