"""What one replacement is: the classes it knows, when it declines, and the forward it puts in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

Forward = Callable[..., Any]
Folded = TypeVar("Folded")


@dataclass(frozen=True)
class Rule:
    """How modules of some classes are replaced.

    op: the operator that takes over. classes: names of the classes, matched exactly. refuse: why a module of such a
    class cannot be replaced, or None. make: from the forward of the module's class and a counter to the forward that
    replaces it, a function of (module, …). What a caller can change after patching, it looks at in every call.
    """

    op: str
    classes: tuple[str, ...]
    refuse: Callable[[nn.Module], str | None]
    make: Callable[[Forward, Counter[str]], Forward]


def lacks(module: nn.Module, *names: str) -> str | None:
    """Why a module without these attributes is not the class that its name says, or None."""
    missing = [name for name in names if not hasattr(module, name)]
    return f"it has no attribute {', '.join(missing)}" if missing else None


def hooked(module: nn.Module) -> bool:
    """Whether something watches this module's calls, which a replacement would skip."""
    return any(getattr(module, f"_{name}_hooks") for name in ("forward", "forward_pre", "backward", "backward_pre"))


_folded: WeakKeyDictionary[nn.Module, tuple[list[tuple], list[Tensor], Any]] = WeakKeyDictionary()


def folded(module: nn.Module, tensors: list[Tensor], fold: Callable[[], Folded]) -> Folded:
    """`fold()`, remembered until one of the module's `tensors` is changed in place, moved, converted or replaced.

    A change through `.data` or another alias that autograd does not track is not seen: `forget` the module then.
    """
    if any(t.is_inference() for t in tensors):
        # They have no version, by which a change in place is seen.
        return fold()
    key = [(t.data_ptr(), t.dtype, t.device, t._version) for t in tensors]
    known = _folded.get(module)
    if known is None or known[0] != key:
        # The tensors are kept so that their addresses are not given to others.
        known = _folded[module] = (key, [t.detach() for t in tensors], fold())
    return known[2]


def forget(module: nn.Module) -> None:
    """Fold anew when the module is called next."""
    _folded.pop(module, None)
