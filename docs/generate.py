"""Write the pages that follow from the code: `python docs/generate.py`; with --check only say whether they are current.

api.md from signatures and docstrings, errors.md from what the code raises, support.md from the tables of backends and
of modules that `patch` knows, versions.md from the recorded runs of the suites.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
NOTE = "<!-- Written by docs/generate.py; change the docstrings and run `make docs`. -->\n"
MODULES = ("vpt_kernels", "vpt_kernels.layers", "vpt_kernels.hub", "vpt_kernels.live", "vpt_model")
COMMANDS = ("app", "mini", "checkpoint/convert.py", "published/recordings.py", "published/verify.py")
"""Parts of `vpt_model` that only its command line needs, which prints its errors itself."""
RAISED = ("ValueError", "TypeError", "BackendUnavailable", "RuntimeError", "ImportError")

VERIFIED = (
    (
        "`roi_patches`",
        "reference, cpp",
        "uint8",
        "CPU: bit-exact with Pillow 12.0 and 13.0, and with transformers' processors",
    ),
    (
        "`roi_patch_embed`",
        "reference, cpp",
        "float32, bfloat16, float16",
        "CPU: against float64, ≤ 2× the unfused error",
    ),
    (
        "`control_cross_attention`",
        "reference, cpp",
        "float32, bfloat16, float16",
        "CPU: against float64, and the authors' recorded projectors",
    ),
    (
        "`append_visual_kv`",
        "reference, cpp",
        "float32, bfloat16, float16; float8-e4m3 caches",
        "CPU: against float64; copies bit for bit",
    ),
    (
        "`cached_attention`",
        "reference, cpp (AVX-512, AVX2, plain C++)",
        "float32, bfloat16, float16, caches too",
        "CPU: against float64, ≤ 2× PyTorch's error",
    ),
    (
        "`packed_linear`",
        "reference, cpp (AVX-512, AVX2, plain C++)",
        "float32, bfloat16, float16; weights also int8, int4",
        "CPU: against float64, ≤ 2× PyTorch's error",
    ),
    (
        "all but `cached_attention` and `packed_linear`, which are for CPUs",
        "triton",
        "as cpp",
        "run in Triton's interpreter by the same tests, compiled for sm_80, sm_90, sm_100, sm_120; **not yet "
        "run on a GPU**",
    ),
    (
        "all (`control_cross_attention`: identity)",
        "cuda",
        "as cpp",
        "compiled for sm_80, sm_90a, sm_100a, sm_120 and executed on the CPU; **not yet run on a GPU**",
    ),
    (
        "all",
        "reference on CUDA",
        "",
        "written, **not run on a GPU** (`make gpu`)",
    ),
    (
        "engine: direct, region, clip, dino, sam, batches",
        "",
        "float32 (CPU)",
        "authors' recorded logits within 1e-4, identical ids; direct and region: transformers within 1e-4",
    ),
    (
        "engine: attention over lengths on the device",
        "triton",
        "float32, bfloat16, float16",
        "run in Triton's interpreter, compiled for the same targets; **not yet run on a GPU**",
    ),
    (
        "engine: flash-attn where installed",
        "",
        "bfloat16, float16",
        "calls bound to the signatures of 2.8.3; **not run**",
    ),
    (
        "engine: CUDA graphs, captured towers, `speculate=True`",
        "",
        "",
        "buckets, padding and order tested on the CPU; **not yet run on a GPU**",
    ),
    (
        "`patch`, caches of other stacks, image processor",
        "",
        "as the operators",
        "CPU: models of transformers 5.17 (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, DINOv2, SAM) with tiny random "
        "weights: the prefill within the 2× rule in float32, bfloat16 and float16; generated logits within "
        "1e-4 of the unpatched float32 model; the published class: a stand-in of its structure; **not on a "
        "GPU**",
    ),
    (
        "training masks, two actions in a row, projector scale 2",
        "",
        "",
        "not supported",
    ),
    (
        "the seven released checkpoints",
        "",
        "",
        "**never loaded**: the loader is tested on files of their layout, true shapes on the meta device",
    ),
    (
        "C++ extension",
        "torch 2.11 …",
        "",
        "built and loaded on torch 2.13, CPU, x86-64 (AVX2 and AVX-512 VNNI); tests clean under Address- and "
        "UndefinedBehaviorSanitizer, the parallel loops under ThreadSanitizer (`make sanitize`); never loaded on 2.11",
    ),
    (
        "wheel for aarch64",
        "torch 2.11 …",
        "",
        "cross-built (`make aarch64`); its inner loops (plain C++) and NEAREST steps run under user-mode emulation; "
        "all that it asks of torch is in torch 2.13's build for aarch64; **the operators never ran there**",
    ),
    (
        "CUDA library",
        "torch 2.11 …",
        "",
        "linked against the CUDA build of torch 2.15 (13.2) and loaded by it without a GPU; elsewhere linked against a "
        "stand-in for libtorch_cuda; **never called on a GPU**",
    ),
)
"""What has been verified of each part, and how. It is written by hand: whoever verifies more says so here."""


def api() -> str:
    lines = ["# API", "", NOTE]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += [f"## `{name}`", "", _text(inspect.getdoc(module) or ""), ""]
        for public in _public(module):
            thing = getattr(module, public)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                lines += [f"### `{public}`", "", *_signature(public, thing), _text(inspect.getdoc(thing) or ""), ""]
            if inspect.isclass(thing):
                lines += _methods(public, thing)
    return "\n".join(lines).rstrip() + "\n"


def _public(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed, key=str.lower)
    own = (name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__)
    return sorted(name for name in own if not name.startswith("_"))


def _signature(name: str, thing: object) -> list[str]:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return []
    # Where an address or a foreign class is a default, its text would differ from run to run.
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>|<factory>", "…", text)
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    text = re.sub(r"^\((self|cls)(, )?", "(", text)
    return ["```", *_wrapped(name + text), "```", ""]


def _wrapped(text: str) -> list[str]:
    if len(text) <= 116:
        return [text]
    head, _, rest = text.partition("(")
    body, _, tail = rest.rpartition(")")
    return [f"{head}(", *(f"    {part}," for part in re.split(r", (?=\**\w+[:=]|\*,|\*$)", body)), f"){tail}"]


def _methods(owner: str, kind: type) -> list[str]:
    lines = []
    ours = [base for base in kind.__mro__ if base.__module__.startswith("vpt_")]
    for name, member in chain.from_iterable(vars(base).items() for base in ours):
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if (name.startswith("_") and name != "__call__") or not inspect.isfunction(function):
            continue
        documented = inspect.getdoc(function)
        if documented:
            shown = (
                [f"`{owner}.{name}`", ""] if isinstance(member, property) else _signature(f"{owner}.{name}", function)
            )
            lines += [*shown, _text(documented), ""]
    return lines


def _text(docstring: str) -> str:
    """A docstring as Markdown: its sections as they are, in a block of text."""
    summary, _, rest = docstring.partition("\n\n")
    return summary + (f"\n\n```text\n{rest.rstrip()}\n```" if rest.strip() else "")


def errors() -> str:
    lines = ["# Errors", "", NOTE]
    lines += [
        "What `vpt_kernels` and `vpt_model` raise; `{…}` stands for a value. A message says what was found, what is",
        "needed and what to do. A call that raises ValueError or TypeError has written nothing: its outputs and its",
        "cache are as they were. A model of another library that was patched calls layer by layer: an error in one",
        "leaves the tokens in the caches of those before it, as without `patch`.",
        "",
    ]
    for path in [*sorted((ROOT / "vpt_kernels").rglob("*.py")), *sorted((ROOT / "vpt_model").rglob("*.py"))]:
        if any(path.is_relative_to(ROOT / "vpt_model" / part) for part in COMMANDS):
            continue
        found = _raised(ast.parse(path.read_text()))
        if found:
            lines += [f"## `{path.relative_to(ROOT).as_posix()}`", "", "| error | message |", "|---|---|"]
            lines += [f"| {kind} | {message} |" for kind, message in found]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _raised(tree: ast.AST) -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        kind = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
        message = _message(node.exc.args[0])
        if kind in RAISED and message:
            found.append((node.lineno, kind, message.replace("|", "\\|").replace("\n", " ")))
    return [(kind, message) for _, kind, message in sorted(found)]


def _message(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{…}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _message(node.left) + _message(node.right)
    return ""


def support() -> str:
    from vpt_kernels.backends import CAPABILITIES, INTERPRETED
    from vpt_kernels.caches import LAYERS
    from vpt_kernels.patch.api import NOT_REPLACED, RULES

    if INTERPRETED:
        raise SystemExit("unset TRITON_INTERPRET: it adds devices that only tests use")
    lines = ["# Support matrix", "", NOTE]
    lines += [
        "What can run where, and [what has been verified](#verified). What a single operator accepts stands in its own",
        "README.",
        "",
        "## Operators",
        "",
        'Backends in the order in which `backend="auto"` tries them; `vpt_kernels.explain(operator, …)` says the same',
        "for the machine it runs on.",
        "",
        "| operator | backend | devices | dtypes |",
        "|---|---|---|---|",
    ]
    for operator, backends in CAPABILITIES.items():
        for name, capability in backends.items():
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in capability.dtypes)
            devices = "any" if capability.devices is None else ", ".join(capability.devices)
            lines.append(f"| `{operator}` | {name} | {devices} | {dtypes} |")
    lines += ["", "## Modules that `patch` replaces", "", "| class | name in `ops` |", "|---|---|"]
    lines += [f"| `{kind}` | `{rule.op}` |" for kind, rule in RULES.items()]
    lines += [
        "",
        f"Caches that can be appended to: layers of class {' and '.join(f'`{name}`' for name in LAYERS)}.",
        "",
    ]
    lines += ["Not replaced, though they look like it:", "", "| class | why |", "|---|---|"]
    lines += [f"| `{kind}` | {why} |" for kind, why in NOT_REPLACED.items()]
    lines += ["", "## Verified", "", "| what | backend | dtypes | how it was verified |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in VERIFIED]
    lines += [
        "",
        "The 2× rule: an error against float64 is at most twice that of the same-dtype PyTorch composition (16-bit:",
        "the largest error; float32: the root mean square, and no single error tenfold).",
    ]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """The last recorded run of every suite, and what failed in it."""
    lines = (FOLDER / "evidence.jsonl").read_text(encoding="utf-8").splitlines()
    last = {run["suite"]: run for run in map(json.loads, lines)}
    text = [
        "# Versions that were run",
        "",
        "<!-- Written by docs/generate.py from evidence.jsonl; run `make evidence`. -->",
        "",
        "The last recorded run of each suite. Nothing is claimed of other sets; what is promised about versions is",
        "said in [stability](stability.md).",
        "",
        "| `make …` | versions | date | commit | passed | failed | errors | skipped | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for suite, run in last.items():
        numbers = " | ".join(str(run[name]) for name in ("passed", "failed", "errors", "skipped", "minutes"))
        used = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        text.append(f"| `{suite}` | {used} | {run['date']} | {run['commit']} | {numbers} |")
    text += ["", "Machines: " + "; ".join(sorted({run["machine"] for run in last.values()})) + ".", ""]
    text += ["## What does not hold", ""]
    for suite, run in last.items():
        if run["failures"] or run["exit"]:
            text.append(f"`make {suite}`, exit {run['exit']}:")
            text += ["", *(f"- `{name}`" for name in run["failures"]), ""]
    if all(run["exit"] == 0 for run in last.values()):
        text += ["Nothing failed in the runs above." if last else "No run has been recorded yet.", ""]
    return "\n".join(text)


PAGES = {"api.md": api, "errors.md": errors, "support.md": support, "versions.md": versions}


def main() -> int:
    stale = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(text)
    written = "stale" if "--check" in sys.argv[1:] else "written"
    print(f"{written}: {', '.join(stale)}" if stale else "all pages are current")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
