"""What `tests.sets` resolves, keeps and runs; pip itself is replaced, the environments are not made."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomllib

from tests import sets

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {
    "dependencies": ["torch>=2.11", "numpy>=2.0", "rich"],
    "optional-dependencies": {
        "encoders": ["transformers>=5.17"],
        "gpu": ["triton>=3.6; platform_system == 'Linux'"],
        "demo": ["scikit-image"],
        "app": ["starlette>=0.46"],
        "test": ["transformers==5.17.0", "numpy<2.4", "setuptools>=64", "ruff==0.17.5"],
    },
}


def test_latest_asks_for_names_alone():
    wanted = sets.requirements("latest", PROJECT)
    assert wanted == [
        "torch",
        "numpy",
        "rich",
        "transformers",
        "triton; platform_system == 'Linux'",
        "scikit-image",
        "starlette",
        "setuptools",
    ]


def test_oldest_asks_for_every_lower_bound():
    wanted = sets.requirements("oldest", PROJECT)
    assert wanted == [
        "torch==2.11",
        "numpy==2.0",
        "rich",
        "transformers==5.17",
        "triton==3.6; platform_system == 'Linux'",
        "scikit-image",
        "starlette==0.46",
        "setuptools==64",
    ]


def test_every_bound_of_the_project_is_run():
    """What a user may install is a bound that test-oldest pins, each dependency with one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sets.requirements("oldest", project)
    for requirement in project["dependencies"] + sum(project["optional-dependencies"].values(), []):
        bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(;.*)?", requirement)
        assert bound is None or f"{bound[1]}=={bound[2]}{bound[3] or ''}" in wanted, requirement
    assert all(">=" in requirement for requirement in project["dependencies"])


def test_the_folder_is_that_of_what_resolved(monkeypatch):
    one = sets.folder_of("latest", ["torch==2.15.0", "rich==15.0"])
    assert one == sets.folder_of("latest", ["torch==2.15.0", "rich==15.0"])
    others = [sets.folder_of("oldest", ["torch==2.15.0", "rich==15.0"])]
    others += [sets.folder_of("latest", ["torch==2.15.1", "rich==15.0"])]
    monkeypatch.setattr(sets.sys, "version", "another")
    others += [sets.folder_of("latest", ["torch==2.15.0", "rich==15.0"])]
    assert len({one, *others}) == 4


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[tuple[list[str], dict[str, str]]]:
    """Commands with their environments, in the place of running them; pip's report names three packages."""
    found = []

    def run(command: list[str], env: dict[str, str] | None = None, **options: object) -> SimpleNamespace:
        found.append((command, env or {}))
        if "--report" in command:
            names = {"torch": "2.15.0", "Pillow": "13.0.0", "kernels": "0.16.2"}
            items = [{"metadata": {"name": name, "version": version}} for name, version in names.items()]
            Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": items}))
        elif "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sets, "ENVIRONMENTS", tmp_path)
    monkeypatch.setenv("PIP_CONSTRAINT", "cap.txt")
    return found


@pytest.mark.parametrize("kind, constraint", [("latest", os.devnull), ("oldest", "cap.txt")])
def test_an_environment_is_made_once(calls, kind, constraint):
    folder = sets.environment(kind)
    assert (folder / "resolved.txt").read_text().split() == ["kernels==0.16.2", "pillow==13.0.0", "torch==2.15.0"]
    pips = [(command[3:], env) for command, env in calls if command[1:3] == ["-m", "pip"]]
    # A machine's cap is lifted for the newest set alone.
    assert {env["PIP_CONSTRAINT"] for _, env in pips} == {constraint}
    asked, main, vocabulary, hub = (command for command, _ in pips)
    assert ("peft" in asked) == (kind == "latest") and "kernels" in asked
    assert main[2:] == ["pillow==13.0.0", "torch==2.15.0"] and vocabulary[-1] == sets.VOCABULARY
    assert hub[-2:] == [str(folder / "hub"), "kernels==0.16.2"]
    calls.clear()
    assert sets.environment(kind) == folder
    assert len(calls) == 1 and "--dry-run" in calls[0][0]


def test_an_environment_that_was_not_finished_is_made_anew(calls):
    folder = sets.environment("latest")
    (folder / "resolved.txt").unlink()
    (folder / "torn").touch()
    calls.clear()
    assert sets.environment("latest") == folder and not (folder / "torn").exists()
    assert any(command[1:3] == ["-m", "venv"] for command, _ in calls)


def test_the_two_used_last_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "ENVIRONMENTS", tmp_path)
    for age, name in enumerate(("latest-c", "latest-a", "latest-b", "oldest-d")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.txt").touch()
        os.utime(tmp_path / name / "resolved.txt", (100 - age, 100 - age))
    (tmp_path / "latest-unfinished").mkdir()
    sets.remove_all_but(2, "latest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest-a", "latest-c", "oldest-d"]


def test_the_subset_is_there():
    assert [name for name in sets.SUBSET if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("kind", sets.BESIDE)
def test_what_runs_and_what_must_be_there(monkeypatch, kind):
    monkeypatch.setenv("VPT_REQUIRE", "nvcc")
    tree, hub = Path("tree"), Path("hub")
    for arguments in ((), ("--subset",)):
        runs = sets.runs(kind, arguments, tree, hub)
        *others, (of_hub, settings) = runs
        assert of_hub[-1] == "tests/hub" and settings["PYTHONPATH"].split(os.pathsep) == ["tree", "hub"]
        assert settings["VPT_REQUIRE"].split(",")[-1] == "kernels"
        for chosen, settings in others:
            named = settings["VPT_REQUIRE"].split(",")
            assert named[:3] == ["nvcc", "triton", "ninja"] and ("peft" in named) == (kind == "latest")
            marks = "not gpu and not slow" + (" and not long" if arguments else "")
            assert settings["PYTHONPATH"] == "tree" and chosen[:2] == ["-m", marks]
    whole = sets.runs(kind, (), tree, hub)
    assert [settings.get("TRITON_INTERPRET") for _, settings in whole] == [None, "1", None]
    ((chosen, _),) = sets.runs(kind, ("tests/patch", "-x"), tree, hub)
    assert chosen[-2:] == ["tests/patch", "-x"]


def test_one_process_that_fails_fails_the_set(monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(sets, "environment", lambda kind: Path("environment"))
    monkeypatch.setattr(sets, "copy_tree", lambda kind, python: Path("tree"))
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: SimpleNamespace(returncode=2 * ("tests/triton" in command))
    )
    assert sets.main("latest") == 2 and sets.main("latest", "--subset") == 0


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "pip"), OSError(28, "No space left on device")])
def test_a_set_that_cannot_be_made_is_not_a_set_that_passed(monkeypatch, tmp_path, capsys, error):
    def fails(kind):
        (tmp_path / f"{kind}-half" / "lib").mkdir(parents=True)
        raise error

    monkeypatch.setattr(sets, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(sets, "environment", fails)
    assert sets.main("oldest", "--subset") == sets.UNMADE
    assert not list(tmp_path.glob("oldest-*"))
    assert "the oldest set was not tested" in capsys.readouterr().err


STATUSES = [(0, 0, 0, 0), (75, 0, 0, 0), (0, 124, 75, 0), (75, 75, 137, 0), (1, 0, 0, 1), (0, 1, 0, 1), (75, 1, 0, 1)]
STATUSES += [(0, 0, 124, 0), (0, 75, 1, 1), (75, 75, 2, 2)]


@pytest.mark.parametrize("oldest, latest, vllm, ends", STATUSES)
def test_ci_names_a_set_that_was_not_tested_and_fails_with_one_that_failed(tmp_path, oldest, latest, vllm, ends):
    """The parts of `.ci/run`, each replaced by a line; `python3` is what the status of a set comes from."""
    script = (ROOT / ".ci" / "run").read_text().replace('cd "$(dirname "$0")/.."', "")
    commands = tmp_path / "bin"
    commands.mkdir()
    of_set = (
        f"echo tests of $3; case $3 in oldest) exit {oldest} ;; latest) exit {latest} ;; --quick) exit {vllm} ;; esac"
    )
    with_limit = 'while [ "$1" != python3 ]; do shift; done; "$@"'
    for name, line in (("make", "true"), ("python3", of_set), ("timeout", with_limit)):
        (commands / name).write_text(f"#!/bin/bash\n{line}\n")
        (commands / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", script]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == ends and "tests of oldest\ntests of latest\n" in found.stdout
    if not ends:
        assert ("oldest: NOT TESTED" in found.stdout) == (oldest != 0)
        assert ("newest: NOT TESTED" in found.stdout) == (latest != 0)
        assert ("vLLM: NOT TESTED" in found.stdout) == (vllm != 0)
