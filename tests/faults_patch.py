"""One-line faults in what `patch` reads, looks up and leaves behind, for `tests.mutate`."""

from __future__ import annotations

GUARD, LOOKUP, COMPILED, LEFT = (f"patch/test_{name}" for name in ("guard", "lookup", "patch_compiled", "left_behind"))

PATCH_ROWS: list[tuple[str, str, str, str, str]] = [
    # name, file, old, new, test files
    (
        "guard: hooks before the call", "guard.py",
        "part._forward_hooks or part._forward_pre_hooks or part._backward_hooks", "part._forward_hooks", GUARD,
    ),
    ("guard: parametrised layers", "guard.py", "if type(part) is not kind:", "if not isinstance(part, kind):", GUARD),
    (
        "guard: a forward on the instance", "guard.py",
        'or ("forward" in own and not is_own_forward(part))', "", GUARD,
    ),
    ("guard: quantised and sharded weights", "guard.py", "type(weight) not in _PLAIN or", "", GUARD),
    ("guard: hooks for all modules", "guard.py", "_every._global_forward_hooks\n        or ", "", GUARD),
    ("guard: tracing", "guard.py", '"torch.jit.trace" if torch.jit.is_tracing() else None', "None", GUARD),
    ("guard: a replaced class", "guard.py", "!= _FORWARDS[kind]", "== ()", GUARD),
    ("copies stay patched", "patch/swap.py", '"__reduce_ex__": reduce, ', "", GUARD),
    ("counts in compiled graphs", "patch/swap.py", "if not torch.compiler.is_compiling():", "if True:", COMPILED),
    ("a class's new forward ignored", "patch/swap.py", "None if own is original else _ANOTHER", "None", LOOKUP),
    ("names looked up too early", "patch/rotary.py", "_originals = originals", "_originals = dict(originals)", LOOKUP),
    (
        "another library's rotation ignored", "patch/rotary.py",
        "is_tracing() else _why_rotated_elsewhere(function)", "is_tracing() else None", LOOKUP,
    ),
    ("a cache's own update ignored", "patch/rotary.py", ' and "update" not in vars(holder)', "", LOOKUP),
    ("strict overlooks what stays", "patch/api.py", "if found and not stays:", "if found:", LOOKUP),
    ("spare room outlives its layer's tensors", "caches.py", "known[0] is dead:", "known is dead:", LEFT),
]  # fmt: skip
