"""How one module gets another forward and its copies do not: it becomes an instance of a subclass of its class.

An attribute `forward` on the instance would be shared by every shallow copy, DataParallel's replicas among them, and
stay bound to the original: the copy would compute with the original's weights. A method of a class is bound by the
call, to whoever is called. The subclass has the name of the class that it stands for and gives copies and pickles away
as instances of that class.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vpt_kernels.guard import OwnForward, is_own_forward
from vpt_kernels.patch.rules import Forward, Rule, record


@dataclass(eq=False)
class Entry:
    """What a module was given: `calls` counts; with `reason` its own forward always runs, for inputs it can read."""

    calls: Counter[str] = field(default_factory=Counter)
    reason: str | None = None


_entries: WeakKeyDictionary[nn.Module, Entry] = WeakKeyDictionary()
_subclasses: dict[tuple[type[nn.Module], Forward], type[nn.Module]] = {}
_ANOTHER = "its class has another forward than when it was patched"


def _subclass(cls: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """Return the subclass of `cls` whose forward asks `rule`; the same for all modules, so that compiled code is
    shared.
    """
    original = cls.forward
    serve = rule.make(original)

    @functools.wraps(original)
    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        own = cls.forward
        reason = None if own is original else _ANOTHER
        calls = None
        if not torch.compiler.is_compiling():
            entry = _entries.get(self)
            if entry is None:
                # A copy that shares the class, or what is left of a patch that was undone.
                return own(self, *inputs, **named)
            calls, reason = entry.calls, entry.reason or reason
        try:
            if reason is None:
                return serve(self, calls, *inputs, **named)
        except OwnForward as declined:
            reason = declined.args[0]  # not str(): torch 2.11 cannot trace it
        if rule.reject is not None:
            rule.reject(self, reason, *inputs, **named)
        record(calls, f"original: {reason}")
        return own(self, *inputs, **named)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made = cls.__reduce_ex__(self, protocol)
        ours = isinstance(made, tuple) and type(self) in made[1]
        # pickle lets `copyreg.__newobj__`, which stands there, make an object of the very class only.
        return (object.__new__, (cls,), *made[2:]) if ours else made

    names = {**rule.methods, "forward": forward, "__reduce_ex__": reduce, "_stands_for": cls}
    names |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (cls,), names)
    made.__qualname__ = cls.__qualname__
    return made


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module has unpatched."""
    return vars(type(module)).get("_stands_for", type(module))


def is_swapped(module: nn.Module) -> bool:
    return own_class(module) is not type(module)


def entry_of(module: nn.Module) -> Entry | None:
    return _entries.get(module) if is_swapped(module) else None


def has_foreign_forward(module: nn.Module) -> bool:
    """Return whether the instance was given a forward that is not its class's."""
    return "forward" in vars(module) and not is_own_forward(module)


def swap(module: nn.Module, rule: Rule, entry: Entry) -> None:
    """Let `rule` serve the module's calls from now on."""
    cls = own_class(module)
    # What removed hooks left behind would hide the subclass's.
    vars(module).pop("forward", None)
    key = cls, cls.forward
    if key not in _subclasses:
        _subclasses[key] = _subclass(cls, rule)
    module.__class__ = _subclasses[key]
    _entries[module] = entry


def unswap(module: nn.Module) -> None:
    """Give the module its class again."""
    _entries.pop(module, None)
    if is_swapped(module):
        vars(module).pop("forward", None)
        module.__class__ = own_class(module)
