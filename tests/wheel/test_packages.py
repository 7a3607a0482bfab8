"""The packages and the licence that any setuptools finds in pyproject.toml and setup.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]


def packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.chdir(folder)
    found = setuptools.Distribution({"license": "of setup.py"})
    found.parse_config_files(["pyproject.toml"])
    return set(found.packages)


def test_every_folder_with_files_is_a_package(monkeypatch):
    """Those with data alone too: setuptools would leave them out one day, as its warning says."""
    folders = {
        path.parent for name in ("vpt_kernels", "vpt_model") for path in (ROOT / name).rglob("*") if path.is_file()
    }
    expected = {".".join(path.relative_to(ROOT).parts) for path in folders if path.name != "__pycache__"}
    assert "vpt_model.mini.weights" in expected
    found = packages(ROOT, monkeypatch)
    assert found == expected


def test_a_new_package_is_found(tmp_path, monkeypatch):
    names = {"vpt_kernels", "vpt_kernels.some_operator", "vpt_model", "vpt_model.network", "vpt_model.network.decode"}
    for name in sorted(names | {"tests", "bench.cases"}):
        folder = tmp_path.joinpath(*name.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text('__version__ = "0"\n')
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    assert packages(tmp_path, monkeypatch) == names


def test_no_recent_setuptools_is_needed():
    """An environment of an older torch has one before 77, which refuses a licence expression in the project's table."""
    text = (ROOT / "pyproject.toml").read_text()
    table = text[text.index("[project]") : text.index("[project.optional-dependencies]")]
    assert "\nlicense" not in table and 'dynamic = ["version", "license"]' in table
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text()
