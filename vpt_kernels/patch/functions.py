"""Copies of a library's functions in which some names are exchanged, and what stands inside of its decorators."""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any

from vpt_kernels.guard import OwnForward


class _Names(dict[str, Any]):
    """The globals of a changed copy: what was exchanged, and for all else what the original would find now."""

    def __init__(self, originals: dict[str, Any], exchanged: dict[str, Any]) -> None:
        # The interpreter reads a module's own names, for imports and warnings, past `__missing__`.
        super().__init__({name: value for name, value in originals.items() if name.startswith("__")} | exchanged)
        self._originals = originals

    def __missing__(self, name: str) -> Any:
        return self._originals[name]


def changed_copy(function: Any, exchanged: dict[str, Any], renamed: dict[str, str] | None = None) -> FunctionType:
    """Return the function with some of its global names exchanged, inside the decorators that it has.

    renamed: attributes, of whatever object, that it looks up under another name.
    """
    inner, cells, names = getattr(function, "__wrapped__", None), function.__closure__, function.__globals__
    code = function.__code__
    if inner is None:
        names = _Names(names, exchanged)
        code = code.replace(co_names=tuple((renamed or {}).get(name, name) for name in code.co_names))
    else:
        copy = changed_copy(inner, exchanged, renamed)
        cells = tuple(CellType(copy) if cell.cell_contents is inner else cell for cell in cells or ())
    made = FunctionType(code, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def innermost(function: Any) -> FunctionType:
    """Return the function inside decorators of transformers' own, which pass the call on.

    Raises:
        OwnForward: it is no plain function, or somebody else's decorator is around it.
    """
    while hasattr(function, "__wrapped__"):
        where = getattr(function, "__globals__", {}).get("__name__", type(function).__name__)
        cells = getattr(function, "__closure__", None) or ()
        if not where.startswith("transformers.") or not any(c.cell_contents is function.__wrapped__ for c in cells):
            raise OwnForward(f"its forward is wrapped by a decorator of {where}")
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise OwnForward(f"its forward is a {type(function).__name__}")
    return function
