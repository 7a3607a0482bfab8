"""The wheel in dist/ in an empty environment of every Python that is found here, as a user installs it.

`python -m pytest tests/wheel/pythons.py`, or `make test-pythons`; the folders of pyenv are looked into too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = 10
"""Minor version of the oldest Python that pyproject.toml allows."""
VERSION = "import sys; print(*sys.version_info[:3], sep='.')"


def pythons() -> dict[str, Path]:
    """The newest patch release of each minor version from 3.10 on: on PATH, and under pyenv."""
    found: dict[int, tuple[int, str, Path]] = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = [shutil.which(f"python3.{minor}") for minor in range(OLDEST, 30)]
    for candidate in [*map(Path, filter(None, on_path)), *pyenv.glob("3.*/bin/python")]:
        # A shim of pyenv stands on PATH for versions that are not chosen, and ends with an error.
        done = subprocess.run([candidate, "-c", VERSION], capture_output=True, text=True)
        if done.returncode:
            continue
        version = done.stdout.strip()
        _, minor, patch = map(int, version.split("."))
        if minor >= OLDEST:
            found[minor] = max(found.get(minor, (-1, "", Path())), (patch, version, candidate))
    return {version: python for _, (_, version, python) in sorted(found.items())}


PYTHONS = pythons()


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_is_complete(version: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    environment, python = tmp_path / "environment", tmp_path / "environment" / "bin" / "python"
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: object) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=environment, env=settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    environment.mkdir()
    run(PYTHONS[version], "-m", "venv", environment)
    run(python, "-m", "pip", "install", "-q", "--no-cache-dir", f"{wheel}[demo,app]")
    shutil.copy(ROOT / "tests" / "wheel" / "installed.py", environment)
    try:
        assert run(python, "-I", "installed.py").rstrip().endswith(": complete")
        torch = run(python, "-c", "import importlib.metadata as m; print(m.version('torch'))").strip()
        with capsys.disabled():
            print(f"\nPython {version}\ntorch {torch}, wheel {wheel.name}")
    finally:
        # Several gigabytes each, where torch brings its CUDA libraries.
        shutil.rmtree(environment)
