"""The documentation: every example runs, every link leads somewhere, what follows from the code is current."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# What needs a server is marked "py" and runs in tests/serving/test_server.py.
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
EXAMPLES = {
    f"{page.name} {number}": code
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
}
LINKS = [
    (page, target)
    for page in PAGES
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text())
]
GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(photo).save("photo.jpg")
    with torch.inference_mode():
        exec(compile(EXAMPLES[name], name, "exec"), {})  # noqa: S102


def test_every_guide_has_an_example() -> None:
    guides = ("operators.md", "patch.md", "append_images.md", "add_a_backend.md")
    assert all(any(name.startswith(guide) for name in EXAMPLES) for guide in guides)


@pytest.mark.parametrize("page, target", LINKS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_links(page: Path, target: str) -> None:
    assert (page.parent / target).is_file(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("name", GENERATOR["PAGES"])
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == GENERATOR["PAGES"][name](), "run `make docs`"


def test_generated_pages_hold_what_they_should() -> None:
    import vpt_kernels

    api, errors = ((ROOT / "docs" / name).read_text() for name in ("api.md", "errors.md"))
    assert all(f"### `{name}`" in api for name in vpt_kernels.__all__)
    assert "| ValueError | sections {…} must be three counts" in errors and " at 0x" not in api
    assert "| ValueError | max_looks is {…}; it must be 0 or more |" in errors
    assert "`vpt_model/app/cli.py`" not in errors


def tracked(*patterns: str) -> list[Path]:
    """The repository's files that match, by git where there is one, else by walking."""
    found = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 0 and found.stdout:
        return [ROOT / name for name in found.stdout.splitlines() if (ROOT / name).is_file()]
    return [path for pattern in patterns for path in ROOT.rglob(pattern)]


def test_pages_that_the_code_names_exist() -> None:
    named = {page for path in tracked("*.py") for page in re.findall(r"\bdocs/\w+\.md\b", path.read_text())}
    assert named and not [page for page in sorted(named) if not (ROOT / page).is_file()]


def test_every_environment_variable_is_listed() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    read = set()
    for path in tracked("*.py"):
        read |= set(re.findall(r"environ(?:\.get\(|\[)\s*\"([A-Z_]+)\"\]?(?!\s*=)", path.read_text()))
    for path in tracked("*.cpp", "*.h", "*.cuh", "*.cu"):
        read |= set(re.findall(r"getenv\(\"([A-Z_]+)\"\)", path.read_text()))
    assert read and listed == read, f"not listed: {sorted(read - listed)}; not read: {sorted(listed - read)}"


def test_commits_are_checked_by_the_tools_of_make_lint() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = set(re.findall(r'"((?:ruff|clang-format)==[^"]+)"', (ROOT / "pyproject.toml").read_text()))
    assert len(pinned) == 2
    assert set(re.findall(r"additional_dependencies: \[(.+)\]", hooks)) == pinned
