"""`python -m tests.wheel.contents FOLDER`: what the built distributions contain, and that it is all."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vpt_kernels", "vpt_model")
LIBRARIES = ("vpt_kernels/_C.so", "vpt_kernels/_C_cuda.so")
# Libraries are compiled anew, and the operators' READMEs are read in the repository.
NOT_PACKED = (".so", ".pyc", ".md")


def check(folder: Path) -> None:
    """Raise ValueError unless the wheel is an abi3 one with every module and weight, and the sdist has all for it."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    python, abi, platform = wheel.stem.split("-")[-3:]
    if (python, abi) != ("cp310", "abi3") or not platform.startswith("manylinux_"):
        raise ValueError(f"{wheel.name} has the tag {python}-{abi}-{platform}; expected: cp310-abi3-manylinux_…")
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    modules = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in NOT_PACKED}
    if not any(name.endswith(".safetensors") for name in modules):
        raise ValueError(f"{ROOT} has no *.safetensors, the demo's weights: nothing would be checked for them")
    missing = modules | set(LIBRARIES[:1])
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        missing -= set(names)
        extra = [name for name in names if name.split("/")[0] not in FOLDERS and ".dist-info/" not in name]
        # Of torch's libraries or the system's none is packed: torch brings its own.
        extra += [name for name in names if ".so" in name and name not in LIBRARIES]
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
