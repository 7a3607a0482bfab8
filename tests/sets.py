"""The tests on another set of versions than the pinned one, in an environment of its own.

    python3 -m tests.sets latest [pytest arguments]     the newest of everything
    python3 -m tests.sets oldest [pytest arguments]     the lower bounds that pyproject.toml declares

Without arguments the whole suite runs; `--subset` runs the tests that meet other libraries. An environment is kept by
the hash of what pip resolves, outside the tree; the tree itself is copied to build/sets and its CPU extension, without
the CUDA sources, is built there. Needs Python 3.11 and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vpt-kernels" / "sets"
KEPT = 2
"""Environments kept of a set; each has several gigabytes."""
VOCABULARY = "dashscope==2.0.2"
"""As the Makefile's QWEN_VOCABULARY: one of its files is read, its dependencies are not wanted."""
SUBSET = (
    "tests/contracts",
    "tests/patch",
    "tests/hub",
    "tests/model/network/test_encoders.py",
    "tests/model/network/test_sam_attention.py",
    "tests/model/checkpoint",
    "tests/model/engine/test_preprocessing.py",
    "tests/kernels/test_pixel_values.py",
    "tests/kernels/test_pass_order.py",
    "tests/test_examples.py",
    "tests/test_readme.py",
    "tests/aot",
)
FEW = ("-m", "not gpu and not slow")


def requirements(kind: str, project: dict) -> list[str]:
    """What the project asks for, with every extra: names alone, or for "oldest" pinned to their lower bounds."""
    asked = [*project["dependencies"]]
    for extra in ("encoders", "gpu", "demo", "test"):
        asked += project["optional-dependencies"][extra]
    found: dict[str, str] = {}
    for requirement in asked:
        name, bounds, marker = re.fullmatch(r"([\w-]+)([^;]*)(;.*)?", requirement).groups()
        bound = re.search(r">=([\d.]+)", bounds)
        if name not in found or "==" not in found[name]:
            pin = f"=={bound[1]}" if bound and kind == "oldest" else ""
            found[name] = f"{name}{pin}{marker or ''}"
    return list(found.values())


def pip(python: Path, *arguments: str) -> None:
    # A machine may cap versions for everyone; the newest set is the newest, so that here the cap does not hold.
    environment = os.environ | {"PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([str(python), "-m", "pip", *arguments], env=environment, check=True)


def resolve(wanted: list[str]) -> list[str]:
    """name==version of all that pip would install into an empty environment."""
    folder = ENVIRONMENTS / "resolver"
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    report = folder / f"report-{os.getpid()}.json"
    pip(folder / "bin" / "python", "install", "-q", "--dry-run", "--report", str(report), *wanted)
    items = json.loads(report.read_text())["install"]
    report.unlink()
    return sorted(f"{item['metadata']['name'].lower()}=={item['metadata']['version']}" for item in items)


def environment(kind: str) -> Path:
    """The Python of the set's environment, made where what pip resolves has changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    resolved = resolve(requirements(kind, project))
    state = "\n".join((*resolved, VOCABULARY, sys.version))
    folder = ENVIRONMENTS / f"{kind}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    python, ready = folder / "bin" / "python", folder / "resolved.txt"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip(python, "install", "-q", *resolved)
        pip(python, "install", "-q", "--no-deps", VOCABULARY)
        ready.write_text("\n".join(resolved) + "\n")
    os.utime(ready)
    others = sorted(ENVIRONMENTS.glob(f"{kind}-*/resolved.txt"), key=lambda path: path.stat().st_mtime)
    for old in others[:-KEPT]:
        shutil.rmtree(old.parent)
    return python


def copy_tree(kind: str, python: Path) -> Path:
    """The tree as it stands, with the CPU extension built by the set's torch."""
    target = ROOT / "build" / "sets" / kind
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target)
        if path.is_file() and name.parts[0] != "build" and str(name) not in names and path.suffix != ".so":
            path.unlink()
    for name in sorted(names):
        source, copy = ROOT / name, target / name
        # An unchanged file keeps its time, so that only what changed is compiled again.
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    marker = target / "build" / "built-by.txt"
    if not marker.exists() or marker.read_text() != str(python):
        shutil.rmtree(target / "build", ignore_errors=True)
        for library in (target / "vpt_kernels").glob("*.so"):
            library.unlink()
    build = "import runpy, sys, torch.utils.cpp_extension as c; c.CUDA_HOME = None; sys.argv = ['setup.py', '-q', "
    build += "'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([str(python), "-c", build], cwd=target, env=os.environ | {"PATH": path}, check=True)
    if not list((target / "vpt_kernels").glob("_C*.so")):
        raise SystemExit(f"the extension was not built by {python}: see above")
    marker.parent.mkdir(exist_ok=True)
    marker.write_text(str(python))
    return target


def main(kind: str, *arguments: str) -> int:
    """Run pytest twice, as `make test` does: on the compiled kernels and, in a process of its own, interpreted."""
    python = environment(kind)
    tree = copy_tree(kind, python)
    said = "import importlib.metadata as m; print('Python', sys.version.split()[0]); "
    said += "print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ', flush=True)"
    names = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pillow", "numpy", "typer", "rich")
    subprocess.run([str(python), "-c", f"import sys; {said}", *names], check=True)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    settings = os.environ | {"PATH": path, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    pytest = [str(python), "-m", "pytest", *FEW]
    if arguments and arguments != ("--subset",):
        return subprocess.run([*pytest, *arguments], cwd=tree, env=settings).returncode
    if arguments:
        chosen = [name for name in SUBSET if (tree / name).exists()]
        return subprocess.run([*pytest, *chosen], cwd=tree, env=settings).returncode
    whole = subprocess.run([*pytest, "--ignore=tests/triton", "--ignore=tests/hub"], cwd=tree, env=settings)
    interpreted = subprocess.run([*pytest, "tests/triton"], cwd=tree, env=settings | {"TRITON_INTERPRET": "1"})
    return whole.returncode or interpreted.returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("latest", "oldest"):
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
