"""What one replacement is: the classes it knows, when it declines, and what it does in place of their forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Serve = Callable[..., Any]
Folded = TypeVar("Folded")


@dataclass(frozen=True)
class Rule:
    """How modules of some classes are replaced.

    Attributes:
        op: the operator that takes over.
        classes: names of the classes, matched exactly.
        refuse: why a module of such a class can never be served, or None. Asked by `patch`.
        declines: why it would not be served now, or None: what hooks, adapters and copies change. Asked by `patch`,
            and by `serve` in every call.
        make: from the forward of the module's class to `serve(module, calls, *inputs, **named)`, which computes what
            that forward would and counts the way it took, or raises OwnForward.
        reject: raises ValueError where the module's own forward, taken for the given reason, would misread its inputs;
            called as `reject(module, reason, *inputs, **named)`. None: it takes them all.
        methods: what a replaced module's class has beside its forward, for copies of that forward to find.
    """

    op: str
    classes: tuple[str, ...]
    refuse: Callable[[nn.Module], str | None]
    declines: Callable[[nn.Module], str | None]
    make: Callable[[Forward], Serve]
    reject: Callable[..., None] | None = None
    methods: dict[str, Any] = field(default_factory=dict, compare=False)


def record(calls: Counter[str] | None, way: str) -> None:
    """Count a call by the way it took; not in a compiled graph, which would be compiled anew for every count."""
    if calls is not None and not torch.compiler.is_compiling():
        calls[way] += 1


def lacks(module: nn.Module, *names: str) -> str | None:
    """Return why a module without these attributes is not the class that its name says, or None."""
    own, parts = module.__dict__, module._modules
    missing = [name for name in names if name not in own and name not in parts and not hasattr(module, name)]
    return f"it has no attribute {', '.join(missing)}" if missing else None


_folded: WeakKeyDictionary[object, tuple[list[tuple[Any, ...]], list[Tensor], Any]] = WeakKeyDictionary()


def folded(owner: object, tensors: list[Tensor], fold: Callable[[], Folded]) -> Folded:
    """Return `fold()`, remembered for its owner until one of the `tensors` is changed in place, moved, converted or
    replaced.

    A change through `.data` or another alias that autograd does not track is not seen: `forget` the owner then.
    """
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        # A compiled graph folds by itself; inference tensors have no version, by which a change in place is seen.
        return fold()
    key = [(t.data_ptr(), t.dtype, t.device, t._version) for t in tensors]
    known = _folded.get(owner)
    if known is None or known[0] != key:
        # The tensors are kept so that their addresses are not given to others.
        known = _folded[owner] = (key, [t.detach() for t in tensors], fold())
    return known[2]


def forget(owner: object) -> None:
    """Fold anew when the owner asks next."""
    _folded.pop(owner, None)
