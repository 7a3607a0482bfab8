"""`python -m tests.wheel.contents FOLDER`: what the built distributions contain, and that it is all."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vpt_kernels", "vpt_model")
KINDS = ("*.py", "*.json", "*.safetensors", "py.typed")


def check(folder: Path) -> None:
    """Raise ValueError unless the wheel is an abi3 one with every module and weight, and the sdist has all for it."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    python, abi, platform = wheel.stem.split("-")[-3:]
    if (python, abi) != ("cp310", "abi3") or platform == "any":
        raise ValueError(f"{wheel.name} has the tag {python}-{abi}-{platform}; expected: cp310-abi3-<platform>")
    files = [path for name in FOLDERS for kind in KINDS for path in (ROOT / name).rglob(kind)]
    modules = {path.relative_to(ROOT).as_posix() for path in files}
    if not any(name.endswith(".safetensors") for name in modules):
        raise ValueError(f"{ROOT} has no *.safetensors, the demo's weights: nothing would be checked for them")
    missing = modules | {"vpt_kernels/_C.so"}
    with zipfile.ZipFile(wheel) as packed:
        missing -= set(packed.namelist())
        extra = [name for name in packed.namelist() if name.split("/")[0] not in FOLDERS and ".dist-info/" not in name]
    if missing or extra:
        raise ValueError(f"{wheel.name} lacks {sorted(missing)} and has {extra} beside the packages")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    missing = (modules | sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}) - names
    if missing or any(name.endswith(".so") for name in names):
        raise ValueError(f"{sdist.name} lacks {sorted(missing)}, or holds compiled files")
    print(f"{wheel.name} and {sdist.name} are complete")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
