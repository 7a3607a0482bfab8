"""Which Pythons `make test-pythons` takes."""

from __future__ import annotations

from pathlib import Path

from tests.wheel.pythons import pythons


def test_the_newest_patch_release_of_each_minor_version(monkeypatch, tmp_path):
    def place(folder: str, name: str, script: str) -> Path:
        python = tmp_path / folder / name
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return python

    on_path = place("shims", "python3.12", "echo 3.12.9")
    place("shims", "python3.14", "echo 'not chosen' >&2; exit 127")
    place("versions/3.9.1/bin", "python", "echo 3.9.1")
    old = place("versions/3.10.2/bin", "python", "echo 3.10.2")
    place("versions/3.12.1/bin", "python", "echo 3.12.1")
    new = place("versions/3.13.10/bin", "python", "echo 3.13.10")
    place("versions/3.13.9/bin", "python", "echo 3.13.9")
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert pythons() == {"3.10.2": old, "3.12.9": on_path, "3.13.10": new}
