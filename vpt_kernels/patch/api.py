"""`patch`: one call that makes a model of another library use the kernels, and one that undoes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any
from weakref import ref

from torch import nn

from vpt_kernels.patch import embeds, projectors, rotary
from vpt_kernels.patch.rules import Forward, forget

RULES = (*embeds.RULES, *projectors.RULES, *rotary.RULES)
OPS = ("roi_patch_embed", "control_cross_attention", "append_visual_kv")
"""What `patch` can be asked for: patch embeddings, the re-encoder's projectors, rotary embedding + cache update."""

NOT_REPLACED = {
    **dict.fromkeys(
        ("VisionAttention", "VisionSdpaAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention"),
        "it rotates without a cache: there is nothing to append",
    ),
    **dict.fromkeys(
        ("PatchMerger", "Qwen2_5_VLPatchMerger", "Qwen3VLVisionPatchMerger"),
        "a norm and an MLP without a control state: not the conditioned projector",
    ),
    "Projector": "a base class whose score multiplies the features: not the rank-one update",
}
"""Classes that look like a case for an operator and are none."""


@dataclass(frozen=True)
class Replacement:
    """One module whose forward was replaced.

    Attributes:
        name: the module's name in the model. kind: its class. op: the name in `ops` that it was replaced for.
        calls: how often each way was taken: an operator's name ("linear": one GEMM of PyTorch), or "original: reason"
            where a call went to the module's own forward.
    """

    name: str
    kind: str
    op: str
    module: nn.Module = field(repr=False)
    forward: MethodType = field(repr=False)
    calls: Counter[str] = field(default_factory=Counter)


class PatchReport:
    """What `patch` replaced and what not, with counts of calls; undo with `unpatch()` or as a context manager.

    Attributes:
        replaced: one `Replacement` per module.
        skipped: name of a module → why it was not replaced.
    """

    def __init__(self, replaced: list[Replacement], skipped: dict[str, str]) -> None:
        self.replaced, self.skipped = tuple(replaced), skipped
        self._in_place = True

    @property
    def calls(self) -> Counter[str]:
        """Calls of all replaced modules by the way they took; see `Replacement.calls`."""
        return sum((replacement.calls for replacement in self.replaced), Counter())

    def unpatch(self) -> None:
        """Give every module its own forward again; a second call does nothing.

        Raises:
            ValueError: something else has replaced a forward since; undo that first. Nothing is undone then.
        """
        if not self._in_place:
            return
        mine = [r for r in self.replaced if "forward" in vars(r.module)]
        for replacement in mine:
            if vars(replacement.module)["forward"] is not replacement.forward:
                raise ValueError(f"{replacement.name} has another forward than patch gave it; undo that change first")
        for replacement in mine:
            del replacement.module.forward
        self._in_place = False

    def __enter__(self) -> PatchReport:
        """The report; raises ValueError if it was undone, for then nothing is replaced inside."""
        if not self._in_place:
            raise ValueError("this patch was undone by unpatch(); call patch(model) again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def __str__(self) -> str:
        """A table: modules that differ in their numbers only share a line."""
        lines = []
        for (pattern, kind, op), calls in _grouped(self.replaced).items():
            counted = sum(calls, Counter())
            ways = ", ".join(f"{count} {way}" for way, count in sorted(counted.items())) or "none yet"
            lines.append(f"{pattern} ({kind}{_times(len(calls))}) replaced [{op}], calls: {ways}")
        reasons: dict[tuple[str, str], int] = Counter((_pattern(name), reason) for name, reason in self.skipped.items())
        lines += [f"{pattern}{_times(count)} not replaced: {reason}" for (pattern, reason), count in reasons.items()]
        return "\n".join(lines) or "nothing to replace"


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name) or "(the model)"


def _times(count: int) -> str:
    return f" ×{count}" if count > 1 else ""


def _grouped(replaced: Iterable[Replacement]) -> dict[tuple[str, str, str], list[Counter[str]]]:
    groups: dict[tuple[str, str, str], list[Counter[str]]] = {}
    for r in replaced:
        groups.setdefault((_pattern(r.name), r.kind, r.op), []).append(r.calls)
    return groups


def _bound(module: nn.Module, original: Forward, replacing: Forward) -> MethodType:
    """`replacing` for this module alone: copies take a module's attributes along, and keep their `original`."""
    home = ref(module)

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        return (replacing if home() is self else original)(self, *inputs, **named)

    forward.home = home
    return MethodType(forward, module)


def _replaced_already(module: nn.Module) -> bool:
    """Whether the module has another forward than its class; what a copy or a pickle of it took along is none."""
    if "forward" not in vars(module):
        return False
    function = getattr(module.forward, "__func__", None)
    if function is type(module).forward:
        return False
    home = getattr(function, "home", None)
    return home is None or home() is module


def patch(model: nn.Module, ops: Iterable[str] | None = None, strict: bool = True) -> PatchReport:
    """Make a model of another library use the kernels; only this instance is changed, and `unpatch()` undoes it.

    Replaces the `forward` of modules that it knows by class name and whose attributes and shapes fit:
    patch embeddings and rotary embedding + KV-cache update of transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL, patch
    embeddings of its DINOv2 and SAM vision encoder, and in the published `VPT_Qwen2VLForConditionalGeneration` also
    the projectors. Weights, state dict, hooks of the replaced modules and class definitions stay as they are. Copies
    and pickles of a patched model are not patched, and can be.

    A call that the kernels cannot serve (gradients, autocast, a sliding or quantised cache, torch.compile, a part that
    has hooks or was exchanged since) takes the module's own forward; the report counts it with the reason. uint8
    patches, which only the kernels take, raise ValueError there.

    What is folded from weights follows when they are changed in place, moved or loaded. A change through `.data` is
    not seen: call `unpatch()` and `patch` again after one.

    Args:
        model: any module; what it contains is searched.
        ops: which of "roi_patch_embed", "control_cross_attention" and "append_visual_kv" may take over; default: all.
        strict: raise if nothing was replaced.

    Returns:
        PatchReport, also a context manager that undoes the replacement at its end.

    Raises:
        TypeError: model is not a torch module.
        ValueError: an unknown name in ops; with strict, nothing to replace. The model is untouched then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    wanted = OPS if ops is None else tuple(ops)
    unknown = [name for name in wanted if name not in OPS]
    if unknown or isinstance(ops, str):
        raise ValueError(f"ops is {ops!r}; give a list with names out of {OPS}")
    replaced: list[Replacement] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        rule = next((rule for rule in RULES if kind in rule.classes), None)
        if rule is None:
            if kind in NOT_REPLACED:
                skipped[name] = f"{kind}: {NOT_REPLACED[kind]}"
            continue
        reason = rule.refuse(module)
        if _replaced_already(module):
            reason = "its forward was replaced before (by patch, or by another library's hooks)"
        elif rule.op not in wanted:
            reason = f"{rule.op} was not asked for"
        if reason is not None:
            skipped[name] = f"{kind}: {reason}"
            continue
        calls: Counter[str] = Counter()
        original = type(module).forward
        forward = _bound(module, original, rule.make(original, calls))
        replaced.append(Replacement(name, kind, rule.op, module, forward, calls))
    if strict and not replaced:
        known = ", ".join(sorted(kind for rule in RULES for kind in rule.classes))
        listed = "; ".join(f"{name or 'the model'} is skipped: {why}" for name, why in skipped.items())
        raise ValueError(
            f"nothing in {type(model).__name__} can be replaced ({listed or 'no known class'}); known classes: "
            f"{known}. Pass strict=False to accept that"
        )
    for replacement in replaced:
        forget(replacement.module)
        replacement.module.forward = replacement.forward
    return PatchReport(replaced, skipped)
