"""The import rules: who may import whom. Each wing states its own in the first sentence of its `__init__`."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS, MODEL = ROOT / "vpt_kernels", ROOT / "vpt_model"
IMPLEMENTATIONS = {"reference", "triton", "cuda", "cpp"}


def module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that the file names in an import, at its top or inside a function, relative ones resolved."""
    package = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def reaches(path: Path, target: str) -> bool:
    return any(name == target or name.startswith(target + ".") for name in imports(path))


KERNEL_FILES = sorted(KERNELS.rglob("*.py"))
each_kernel_file = pytest.mark.parametrize("path", KERNEL_FILES, ids=module)


def test_the_reader_of_imports_works():
    assert reaches(KERNELS / "__init__.py", "vpt_kernels.backends")
    assert reaches(KERNELS / "roi_patch_embed" / "reference.py", "torch")
    assert not reaches(KERNELS / "library.py", "vpt_kernels.backends")
    assert len(KERNEL_FILES) > 10


@each_kernel_file
def test_kernels_know_no_model(path):
    for target in ("vpt_model", "transformers", "tests", "bench"):
        if not (target == "transformers" and path.is_relative_to(KERNELS / "live")):
            assert not reaches(path, target)


def test_live_conversations_import_transformers_where_they_use_it():
    """They make its caches, and nothing imports them unasked."""
    code = "import sys, vpt_kernels.live; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@each_kernel_file
def test_implementations_stand_apart(path):
    """An implementation imports neither another one, nor the public functions, nor the choice between backends."""
    if path.stem not in IMPLEMENTATIONS:
        return
    for other in KERNEL_FILES:
        if other != path and other.stem in IMPLEMENTATIONS | {"api", "backends"}:
            assert not reaches(path, module(other)), f"{module(path)} imports {module(other)}"
    assert "vpt_kernels" not in imports(path)


@each_kernel_file
def test_only_the_package_imports_implementations(path):
    """Registration happens on import: `vpt_kernels/__init__.py` alone brings implementations in."""
    if path == KERNELS / "__init__.py":
        return
    for other in KERNEL_FILES:
        if other != path and other.stem in IMPLEMENTATIONS:
            assert not reaches(path, module(other)), f"{module(path)} imports {module(other)}"


def stated(wing: Path) -> set[str]:
    """What the first sentence of the wing's docstring allows it: the names behind "may import"."""
    docstring = ast.get_docstring(ast.parse((wing / "__init__.py").read_text()))
    sentence = " ".join(docstring.split(".")[0].split())
    return set(re.split(r", | and ", sentence.partition("may import ")[2]))


WINGS = sorted(path.parent for path in MODEL.glob("*/__init__.py"))
WING_FILES = [(wing, path) for wing in WINGS for path in sorted(wing.rglob("*.py"))]
RULES = {
    "app": {"mini", "published", "engine", "network", "checkpoint", "text", "config", "vpt_kernels"},
    "mini": {"engine", "network", "checkpoint", "text", "config", "vpt_kernels"},
    "published": {"engine", "network", "checkpoint", "text", "config", "vpt_kernels"},
    "engine": {"network", "checkpoint", "text", "config", "vpt_kernels"},
    "vllm": {"network", "checkpoint", "text", "config", "vpt_kernels"},
    "network": {"checkpoint", "text", "config", "vpt_kernels"},
    "checkpoint": {"text", "config", "vpt_kernels"},
    "text": {"config"},
}
"""What the sentences must say: a wing cannot allow itself more in passing."""


@pytest.mark.parametrize("wing", WINGS, ids=module)
def test_a_wing_says_what_it_may_import(wing):
    assert stated(wing) == RULES[wing.name]


@pytest.mark.parametrize(("wing", "path"), WING_FILES, ids=[module(path) for _, path in WING_FILES])
def test_a_wing_imports_what_it_says(wing, path):
    found = {name for name in imports(path) if name.split(".")[0] in ("vpt_model", "vpt_kernels", "tests", "bench")}
    for name in found - {"vpt_model"}:
        parts = name.split(".")
        target = parts[1] if parts[0] == "vpt_model" else parts[0]
        assert target in stated(wing) | {wing.name}, f"{module(path)} imports {name}"


ENGINE = {
    "loop": {"executor", "graphs", "scheduler", "engine", "chat", "store"},
    "conversation": {"perception", "requests", "loop", "executor", "graphs", "scheduler", "engine", "chat", "store"},
    "executor": {"loop", "scheduler", "engine", "chat", "store"},
    "decoding": {"perception", "loop", "executor", "scheduler", "engine", "chat", "store"},
    "scheduler": {"conversation", "perception", "loop", "graphs", "engine", "chat", "store"},
}
"""What each part of the engine knows nothing of; docs/architecture.md says it in words."""


@pytest.mark.parametrize("part", ENGINE)
def test_a_part_of_the_engine_imports_nothing_it_does_not_know(part):
    path = MODEL / "engine" / f"{part}.py"
    assert [other for other in ENGINE[part] if reaches(path, f"vpt_model.engine.{other}")] == []


KERNEL_WINGS = sorted(path.parent for path in KERNELS.glob("*/__init__.py"))
KERNEL_WING_FILES = [(wing, path) for wing in KERNEL_WINGS for path in sorted(wing.rglob("*.py"))]
OPERATOR = {"backends", "checks", "launch", "library"}
KERNEL_RULES = {
    "append_visual_kv": OPERATOR,
    "cached_attention": OPERATOR,
    "control_cross_attention": OPERATOR,
    "packed_linear": OPERATOR,
    "roi_patch_embed": OPERATOR,
    "patch": {"append_visual_kv", "control_cross_attention", "roi_patch_embed", "caches", "checks", "guard"},
    "live": {"patch", "roi_patch_embed", "checks", "images", "processor"},
}


@pytest.mark.parametrize("wing", KERNEL_WINGS, ids=module)
def test_a_package_of_kernels_says_what_it_may_import(wing):
    assert stated(wing) == KERNEL_RULES[wing.name]
    assert stated(KERNELS) == {"nothing else of this project"}


@pytest.mark.parametrize(("wing", "path"), KERNEL_WING_FILES, ids=[module(path) for _, path in KERNEL_WING_FILES])
def test_a_package_of_kernels_imports_what_it_says(wing, path):
    for name in {name for name in imports(path) if name.startswith("vpt_kernels.")}:
        assert name.split(".")[1] in stated(wing) | {wing.name}, f"{module(path)} imports {name}"


@pytest.mark.parametrize("path", sorted(MODEL.glob("*.py")), ids=module)
def test_the_ground_floor_holds_config_and_aliases_only(path):
    assert path.stem in {"__init__", "config", "model", "tokens"}
    if path.stem == "config":
        assert not reaches(path, "vpt_model") and not reaches(path, "vpt_kernels")


def test_config_repeats_its_checks_word_for_word():
    """It imports neither package, and may not drift apart from the one that has them all."""
    ours, theirs = (
        {node.name: ast.unparse(node) for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for path in (MODEL / "config.py", KERNELS / "checks.py")
    )
    shared = {"require_integer", "require_type", "shown"}
    assert ours.keys() & theirs.keys() == shared
    assert [name for name in shared if ours[name] != theirs[name]] == []


BENCH = ROOT / "bench"
BENCH_FILES = sorted(BENCH.rglob("*.py"))
BENCH_WINGS = sorted(path.parent for path in BENCH.glob("*/__init__.py"))
BENCH_RULES = {
    "cases": {"loops", "rooflines", "timers", "transformers_model", "workloads"},
    "gpu": {"cases", "environment", "transformers_model", "workloads"},
    "launches": {"nothing else of the benchmark"},
    "peers": {"cases", "environment", "loops", "timers"},
    "site": {"alternatives", "gpu", "report"},
    "suite": {"budget", "cases", "environment", "report", "rooflines", "rows", "timers", "workloads"},
    "traces": {"workloads"},
}
OURS = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
"""What lies beside the packages, and would be imported by its name from the folder of the project."""


@pytest.mark.parametrize("wing", BENCH_WINGS, ids=module)
def test_a_wing_of_the_bench_says_what_it_may_import(wing):
    assert stated(wing) == BENCH_RULES[wing.name]


@pytest.mark.parametrize("path", BENCH_FILES, ids=module)
def test_the_bench_imports_what_it_says(path):
    """Of the project the two packages, and of the bench what its wing says; nobody imports the suite."""
    assert stated(BENCH) == {"vpt_kernels", "vpt_model"}
    names = imports(path)
    assert {name.split(".")[0] for name in names} & OURS <= stated(BENCH) | {"bench"}
    within = {name.split(".")[1] for name in names if name.startswith("bench.")}
    wing = path.parent.name
    assert "suite" not in within or wing == "suite"
    if wing != "bench":
        files = {other.stem for other in BENCH.glob("*.py")} | {other.name for other in BENCH_WINGS}
        assert within & files <= BENCH_RULES[wing] | {wing}


def test_the_minimal_benchmark_stands_alone():
    assert not reaches(BENCH / "minimal.py", "bench")


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=module)
def test_no_test_module_is_imported(path):
    """What several test modules share lives in a helper; tests/README.md lists them."""
    modules = {module(other) for other in TESTS if other.stem.startswith("test_")}
    assert not modules & imports(path)


def test_every_helper_is_in_the_index():
    index = (ROOT / "tests" / "README.md").read_text()
    helpers = [path.name for path in TESTS if not path.stem.startswith(("test_", "__", "conftest"))]
    assert [name for name in helpers if f"`{name}`" not in index and f"/{name}`" not in index] == []


def test_the_published_procedure_stands_apart():
    """The baseline shares configuration, vocabulary and prompts with the engine, nothing that computes."""
    for path in (MODEL / "published" / "procedure.py", MODEL / "published" / "encoders.py"):
        for target in ("vpt_model.engine", "vpt_model.network", "vpt_kernels"):
            assert not reaches(path, target)
        assert "vpt_model" not in imports(path)


@pytest.mark.parametrize("path", sorted(MODEL.rglob("*.py")), ids=module)
def test_the_model_uses_public_kernels_only(path):
    inner = {name for name in imports(path) if name.startswith("vpt_kernels.")}
    public = {f"vpt_kernels.{name}" for name in __import__("vpt_kernels").__all__}
    assert inner <= public | {"vpt_kernels.env"}


@pytest.mark.parametrize("name", ["model", "tokens"])
def test_an_alias_warns_and_hands_on(name):
    sys.modules.pop(f"vpt_model.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"vpt_model.{name} has moved"):
        alias = importlib.import_module(f"vpt_model.{name}")
    for public in alias.__all__:
        assert getattr(alias, public).__doc__


def test_the_package_exports_what_it_lists():
    """`__init__.py` is the public API and nothing else."""
    import vpt_kernels

    tree = ast.parse((KERNELS / "__init__.py").read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert len(set(vpt_kernels.__all__)) == len(vpt_kernels.__all__)
    for name in vpt_kernels.__all__:
        assert getattr(vpt_kernels, name).__doc__


PUBLIC = [path for folder in (KERNELS, MODEL, ROOT / "tests", ROOT / "bench") for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_classes_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes if node.end_lineno - node.lineno >= 250] == []


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*/reference.py")), ids=module)
def test_an_operator_says_where_its_code_is(path):
    """Its README names every Python file of it."""
    where = (path.parent / "README.md").read_text().partition("## Where the code is")[2].partition("\n## ")[0]
    assert [file.name for file in path.parent.glob("[a-z]*.py") if f"`{file.name}`" not in where] == []
