"""What `patch` did, call by call, and how to undo it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

from torch import nn

from vpt_kernels.patch import swap


@dataclass(frozen=True)
class Replacement:
    """One module whose forward was replaced.

    Attributes:
        name: the module's name in the model. kind: its class. op: the name in `ops` that it was replaced for.
        calls: how often each way was taken: an operator's name ("linear": one GEMM of PyTorch), or "original: reason"
            where a call went to the module's own forward; "append_visual_kv_ behind its own norms: reason" where the
            module's norms of heads were called first. What a compiled or traced program runs is not counted.
        waits: why the module's own forward would run now, or None: what the module's parts were when it was patched.
    """

    name: str
    kind: str
    op: str
    module: nn.Module = field(repr=False)
    calls: Counter[str] = field(default_factory=Counter)
    waits: str | None = None


class PatchReport:
    """What `patch` replaced and what not, with counts of calls; undo with `unpatch()` or as a context manager.

    Attributes:
        replaced: one `Replacement` per module.
        skipped: name of a module → why it was not replaced.
        stays: the names among the skipped of modules that an operator exists for and that was asked for.
    """

    def __init__(
        self,
        replaced: list[Replacement],
        skipped: dict[str, str],
        stays: tuple[str, ...] = (),
        watched: tuple[tuple[nn.Module, swap.Entry], ...] = (),
    ) -> None:
        self.replaced, self.skipped, self.stays = tuple(replaced), skipped, stays
        self._watched = watched
        self._in_place = True

    @property
    def calls(self) -> Counter[str]:
        """Calls of all replaced modules by the way they took; see `Replacement.calls`."""
        return sum((replacement.calls for replacement in self.replaced), Counter())

    def unpatch(self) -> None:
        """Give every module its own forward again; a second call does nothing.

        Raises:
            ValueError: something else has replaced a forward or a class since; undo that first. Nothing is undone then.
        """
        if not self._in_place:
            return
        for replacement in self.replaced:
            if not swap.is_swapped(replacement.module) or swap.has_foreign_forward(replacement.module):
                raise ValueError(f"{replacement.name} has another forward than patch gave it; undo that change first")
        for replacement in self.replaced:
            swap.unswap(replacement.module)
        for module, entry in self._watched:
            if swap.entry_of(module) is entry:
                swap.unswap(module)
        self._in_place = False

    def __enter__(self) -> PatchReport:
        """Return the report; raises ValueError if it was undone, for then nothing is replaced inside."""
        if not self._in_place:
            raise ValueError("this patch was undone by unpatch(); call patch(model) again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def __str__(self) -> str:
        """Return a table, what stays first; modules that differ in their numbers only share a line."""
        lines = _reasons({name: self.skipped[name] for name in self.stays})
        for (pattern, kind, op, waits), calls in _grouped(self.replaced).items():
            counted = sum(calls, Counter())
            ways = ", ".join(f"{count} {way}" for way, count in sorted(counted.items())) or "none yet"
            waiting = f", but its own forward runs while {waits}" if waits else ""
            lines.append(f"{pattern} ({kind}{_times(len(calls))}) replaced [{op}]{waiting}, calls: {ways}")
        lines += _reasons({name: reason for name, reason in self.skipped.items() if name not in self.stays})
        return "\n".join(lines) or "nothing to replace"


def _reasons(skipped: dict[str, str]) -> list[str]:
    counted = Counter((_pattern(name), reason) for name, reason in skipped.items())
    return [f"{pattern}{_times(count)} not replaced: {reason}" for (pattern, reason), count in counted.items()]


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name) or "(the model)"


def _times(count: int) -> str:
    return f" ×{count}" if count > 1 else ""


def _grouped(replaced: Iterable[Replacement]) -> dict[tuple[str, str, str, str | None], list[Counter[str]]]:
    groups: dict[tuple[str, str, str, str | None], list[Counter[str]]] = {}
    for r in replaced:
        groups.setdefault((_pattern(r.name), r.kind, r.op, r.waits), []).append(r.calls)
    return groups
