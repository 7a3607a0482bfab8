"""Every Triton function of vpt_kernels and vpt_model, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXEMPT: dict[str, str] = {
    "prefetch_weights": "inline PTX, which is not interpreted; it is compiled, computes nothing and runs from sm_90 on",
}
"""Functions that need not be interpreted or compiled, and why."""


def _is_jit(decorator: ast.expr) -> bool:
    decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(decorator) in ("triton.jit", "jit")


def jit_functions() -> dict[str, ast.FunctionDef]:
    """By name; a name that occurs twice is an error, for everything else here goes by name."""
    found: dict[str, ast.FunctionDef] = {}
    for path in sorted(path for package in ("vpt_kernels", "vpt_model") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                if node.name in found:
                    raise ValueError(f"two Triton functions are called {node.name}, one in {path}: rename one")
                found[node.name] = node
    return found


def launches(kernel: str) -> list[tuple[str, dict[str, object]]]:
    """Where `kernel[grid](…)` stands, and the literals among its keyword arguments."""
    found = []
    for path in sorted(path for package in ("vpt_kernels", "vpt_model") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                if isinstance(node.func.value, ast.Name) and node.func.value.id == kernel:
                    literals = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                    found.append((f"{path.name}:{node.lineno}", literals))
    return found


def reached(kernels: set[str]) -> set[str]:
    """The kernels and every Triton function that they call, directly or not."""
    functions, seen, waiting = jit_functions(), set(), list(kernels)
    while waiting:
        name = waiting.pop()
        if name in functions and name not in seen:
            seen.add(name)
            waiting += [n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)]
    return seen
