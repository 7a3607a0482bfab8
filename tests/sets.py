"""The tests on another set of versions than the pinned one, in an environment of its own.

    python3 -m tests.sets latest [pytest arguments]     the newest of everything
    python3 -m tests.sets oldest [pytest arguments]     the lower bounds that pyproject.toml declares

Without arguments the whole suite runs; `--subset` runs the tests that meet other libraries. An environment is kept by
the hash of what pip resolves, outside the tree; the tree itself is copied to build/sets and its CPU extension, without
the CUDA sources, is built there. Needs Python 3.11 and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vpt-kernels" / "sets"
KEPT = 2
"""Environments kept of a set; each has several gigabytes."""
VOCABULARY = "dashscope==2.0.2"
"""As the Makefile's QWEN_VOCABULARY: one of its files is read, its dependencies are not wanted."""
BESIDE = {"latest": ("accelerate", "peft"), "oldest": ()}
"""What users of `patch` bring along; the tests that need it skip elsewhere."""
HUB = ("kernels", "kernels-data", "tomlkit")
"""As the Makefile's HUB_KERNELS, apart for its reason: transformers behaves differently where it finds the first."""
SUBSET = (
    "tests/contracts",
    "tests/patch",
    "tests/live",
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
WHOLE = "not gpu and not slow"
UNMADE = 75
"""Exit status where pip could not make the environment (sysexits.h: may work another time); no test has run."""
SOURCES_ONLY = ("ruff", "clang-format")
"""What the project asks for to look at its sources: no test runs it, and a new one makes no new environment."""


def requirements(kind: str, project: dict) -> list[str]:
    """What the project asks for, with every extra: names alone, or for "oldest" pinned to their lower bounds."""
    asked = [*project["dependencies"]]
    for extra in ("encoders", "gpu", "demo", "app", "test"):
        asked += project["optional-dependencies"][extra]
    found: dict[str, str] = {}
    for requirement in asked:
        name, bounds, marker = re.fullmatch(r"([\w-]+)([^;]*)(;.*)?", requirement).groups()
        bound = re.search(r">=([\d.]+)", bounds)
        if name in SOURCES_ONLY:
            continue
        if name not in found or "==" not in found[name]:
            pin = f"=={bound[1]}" if bound and kind == "oldest" else ""
            found[name] = f"{name}{pin}{marker or ''}"
    return list(found.values())


def pip(kind: str, python: Path, *arguments: str) -> None:
    """Run pip of `python`; a cap that the machine sets for everyone holds for the oldest set alone."""
    lifted = {"PIP_CONSTRAINT": os.devnull} if kind == "latest" else {}
    environment = os.environ | lifted | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([str(python), "-m", "pip", *arguments], env=environment, check=True)


def resolve(kind: str, wanted: list[str]) -> list[str]:
    """name==version of all that pip would install into an empty environment."""
    folder = ENVIRONMENTS / "resolver"
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        pip(kind, folder / "bin" / "python", "install", "-q", "--dry-run", "--report", report.name, *wanted)
        items = json.load(report)["install"]
    return sorted(f"{item['metadata']['name'].lower()}=={item['metadata']['version']}" for item in items)


def folder_of(kind: str, resolved: list[str]) -> Path:
    """Where the environment with these packages lies: another version of anything is another folder."""
    state = "\n".join((*resolved, VOCABULARY, sys.version))
    return ENVIRONMENTS / f"{kind}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time makes or removes environments."""
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENTS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def environment(kind: str) -> Path:
    """The folder of the set's environment, made where what pip resolves has changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    resolved = resolve(kind, [*requirements(kind, project), *BESIDE[kind], HUB[0]])
    folder = folder_of(kind, resolved)
    python, ready = folder / "bin" / "python", folder / "resolved.txt"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        apart = [line for line in resolved if line.split("==")[0] in HUB]
        pip(kind, python, "install", "-q", *(line for line in resolved if line not in apart))
        pip(kind, python, "install", "-q", "--no-deps", VOCABULARY)
        pip(kind, python, "install", "-q", "--no-deps", "--target", str(folder / "hub"), *apart)
        ready.write_text("\n".join(resolved) + "\n")
    os.utime(ready)
    remove_all_but(KEPT, kind)
    return folder


def remove_all_but(kept: int, kind: str) -> None:
    """Remove a set's environments, but for those used last; one that was never finished is no environment."""
    folders = list(ENVIRONMENTS.glob(f"{kind}-*"))
    whole = [folder for folder in folders if (folder / "resolved.txt").exists()]
    whole.sort(key=lambda folder: (folder / "resolved.txt").stat().st_mtime)
    for folder in folders:
        if folder not in whole[-kept:]:
            shutil.rmtree(folder)


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


def runs(kind: str, arguments: tuple[str, ...], tree: Path, hub: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments of pytest and settings of each process, divided as `make test` and `make test-hub` divide them."""
    named = [*filter(None, os.environ.get("VPT_REQUIRE", "").split(",")), "triton", "ninja", *BESIDE[kind]]
    settings = {"VPT_REQUIRE": ",".join(named), "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(tree)}
    cases = WHOLE
    with_hub = {"VPT_REQUIRE": ",".join((*named, HUB[0])), "PYTHONPATH": f"{tree}{os.pathsep}{hub}"}
    of_hub = (["tests/hub"], with_hub)
    if arguments == ("--subset",):
        parts, cases = [(list(SUBSET), {}), of_hub], f"{WHOLE} and not long"
    elif arguments:
        parts = [(list(arguments), {})]
    else:
        parts = [([f"--ignore=tests/{name}" for name in ("triton", "hub", "serving", "browser")], {})]
        parts += [(["tests/triton"], {"TRITON_INTERPRET": "1"}), of_hub]
    common = ("-m", cases, "--continue-on-collection-errors")
    return [([*common, *chosen], settings | changes) for chosen, changes in parts]


def main(kind: str, *arguments: str) -> int:
    """Run pytest in the set's environment; the worst exit status of its processes, or UNMADE."""
    with alone():
        try:
            folder = environment(kind)
        except (subprocess.CalledProcessError, OSError) as error:
            remove_all_but(KEPT, kind)
            print(f"the {kind} set was not tested, its environment cannot be made here: {error}", file=sys.stderr)
            return UNMADE
    python = folder / "bin" / "python"
    tree = copy_tree(kind, python)
    said = "import importlib.metadata as m; print('Python', sys.version.split()[0]); "
    said += "print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ', flush=True)"
    names = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pillow", "numpy", "typer", "rich")
    subprocess.run([str(python), "-c", f"import sys; {said}", *names, *BESIDE[kind]], check=True)
    path = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    codes = [
        subprocess.run([str(python), "-m", "pytest", *chosen], cwd=tree, env=os.environ | path | settings).returncode
        for chosen, settings in runs(kind, arguments, tree, folder / "hub")
    ]
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BESIDE:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
