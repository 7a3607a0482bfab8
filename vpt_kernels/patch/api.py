"""`patch`: one call that makes a model of another library use the kernels, and one that undoes it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vpt_kernels.checks import require_flag, require_type, shown
from vpt_kernels.patch import embeds, projectors, rotary, swap
from vpt_kernels.patch.report import PatchReport, Replacement
from vpt_kernels.patch.rules import Rule, forget
from vpt_kernels.patch.supported import NOT_REPLACED, meant_for

RULES = {name: rule for rule in (*embeds.RULES, *projectors.RULES, *rotary.RULES) for name in rule.classes}
OPS = ("roi_patch_embed", "control_cross_attention", "append_visual_kv")
"""What `patch` can be asked for: patch embeddings, the re-encoder's projectors, rotary embedding + cache update."""


def patch(model: nn.Module, ops: Iterable[str] | None = None, strict: bool = True) -> PatchReport:
    """Make a model of another library use the kernels; only this instance is changed, and `unpatch()` undoes it.

    Replaces the `forward` of modules that it knows by class name and whose attributes and shapes fit:
    patch embeddings and attentions (rotary embedding + KV-cache update, and the norms of heads before it) of
    transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL, attentions of its Qwen3-VL-MoE and Qwen3.5, patch embeddings of its
    DINOv2 and SAM vision encoder, and in the published `VPT_Qwen2VLForConditionalGeneration` also the projectors.
    Weights, state dict, hooks of the replaced modules and class definitions stay as they are: a replaced module becomes
    an instance of a subclass with the same name. Copies and pickles of a patched model are not patched, and can be.

    Weights are read instead of calling the layer that holds them only where that does exactly what the call would do.
    A call that the kernels cannot serve (gradients, autocast, a sliding or quantised cache, tracing, a part that has
    hooks, is offloaded, adapted or parametrised, a cache or a rotation that another library changed) takes the module's
    own forward; the report counts it with the reason. Where only the norms of heads do more, they are called and the
    rest is one kernel, counted with the reason. uint8 patches, which only the kernels take, raise ValueError
    there. Under torch.compile patch embeddings and projectors use the kernels, attentions their own forward, and
    nothing is counted.

    What is folded from weights follows when they are changed in place, moved or loaded. A change through `.data` is
    not seen: call `unpatch()` and `patch` again after one.

    Args:
        model: any module; what it contains is searched.
        ops: which of "roi_patch_embed", "control_cross_attention" and "append_visual_kv" may take over; default: all.
        strict: raise if nothing was replaced, or if a module stays that one of these operators is meant for.

    Returns:
        PatchReport, also a context manager that undoes the replacement at its end.

    Raises:
        TypeError: model is not a torch module.
        ValueError: an unknown name in ops; with strict, what stays, with the reasons. The model is untouched then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    require_type("ops", ops, (list, tuple, set, frozenset, str, type(None)), f"a list with names out of {OPS}")
    require_flag("strict", strict)
    wanted = OPS if ops is None else tuple(ops)
    unknown = [shown(name) for name in wanted if not isinstance(name, str) or name not in OPS]
    if unknown or isinstance(ops, str):
        raise ValueError(f"ops is {shown(ops)} with {', '.join(unknown[:5])}; give a list with names out of {OPS}")
    found: list[tuple[Rule, Replacement]] = []
    skipped: dict[str, str] = {}
    stays: list[str] = []
    watched: list[tuple[nn.Module, Rule, swap.Entry]] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        rule = RULES.get(kind)
        if rule is None:
            if kind in NOT_REPLACED:
                skipped[name] = f"{kind}: {NOT_REPLACED[kind]}"
            elif op := meant_for(type(module).__module__, kind):
                new = "a class of a supported family that this version does not know; report it"
                skipped[name] = f"{kind}: {new if op in wanted else f'{op} was not asked for'}"
                stays += [name] if op in wanted else []
            continue
        reason = f"{rule.op} was not asked for" if rule.op not in wanted else _refused(rule, module)
        if reason is None:
            found.append((rule, Replacement(name, kind, rule.op, module, waits=rule.declines(module))))
            continue
        skipped[name] = f"{kind}: {reason}"
        stays += [name] if rule.op in wanted else []
        if rule.reject is not None and not swap.has_foreign_forward(module) and not swap.is_swapped(module):
            watched.append((module, rule, swap.Entry(reason=reason)))
    if strict:
        _require_all(model, len(found), skipped, stays)
    for rule, replacement in found:
        forget(replacement.module)
        swap.swap(replacement.module, rule, swap.Entry(replacement.calls))
    for module, rule, entry in watched:
        swap.swap(module, rule, entry)
    watching = tuple((module, entry) for module, _, entry in watched)
    return PatchReport([replacement for _, replacement in found], skipped, tuple(stays), watching)


def _refused(rule: Rule, module: nn.Module) -> str | None:
    entry = swap.entry_of(module)
    if swap.has_foreign_forward(module) or (entry is not None and entry.reason is None):
        return "its forward was replaced before (by patch, or by another library's hooks)"
    return rule.refuse(module)


def _require_all(model: nn.Module, found: int, skipped: dict[str, str], stays: list[str]) -> None:
    """Raise ValueError, the modules with their reasons first, unless all that an operator is meant for is replaced."""
    if found and not stays:
        return
    named = {name: skipped[name] for name in stays} or skipped
    listed = "; ".join(f"{name or 'the model'} is skipped: {why}" for name, why in named.items())
    if found:
        raise ValueError(f"{listed}. What else it knows ({found}) can be replaced: pass strict=False to accept that")
    raise ValueError(
        f"nothing in {type(model).__name__} can be replaced ({listed or 'no known class'}); known classes: "
        f"{', '.join(sorted(RULES))}. Pass strict=False to accept that"
    )
