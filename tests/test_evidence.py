"""What `tests.evidence` reads from a suite's output and records, and the page that follows from the records."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests import evidence

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = """Python 3.10.4
torch 2.15.0, triton 3.9.0
tests/a.py ..F
FAILED tests/a.py::test_one[x - y] - assert 1 == 2
ERROR tests/b.py::test_two
= 1 failed, 5580 passed, 3 skipped, 12 deselected, 41 warnings, 2 errors in 1500.20s (0:25:00) =
1 passed, 2 xfailed in 0.20s
"""


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A Makefile whose `make test` prints OUTPUT and ends with status 2; nothing is recorded yet."""
    (tmp_path / "output.txt").write_text(OUTPUT)
    (tmp_path / "Makefile").write_text("test:\n\t@cat output.txt; exit 1\nsanitize:\n\t@echo clean\n")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "RECORD", tmp_path / "evidence.jsonl")
    monkeypatch.setattr(evidence, "git", lambda *arguments: "abc1234" if arguments[0] == "rev-parse" else "")
    return tmp_path / "evidence.jsonl"


def recorded(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page(monkeypatch, record: Path) -> str:
    """docs/versions.md as it follows from these records."""
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    monkeypatch.setattr(generate, "FOLDER", record.parent)
    return generate.versions()


def test_every_suite_is_a_target_of_the_makefile():
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(evidence.SUITES) <= {name for line in targets for name in line.split()}


def test_a_failing_suite_is_recorded_as_failed(suite, monkeypatch, capsys):
    assert evidence.main("test") == 2
    (line,) = recorded(suite)
    assert capsys.readouterr().out.startswith(OUTPUT)
    assert {name: line[name] for name in evidence.COUNTS} == {"passed": 5581, "failed": 1, "skipped": 3, "errors": 2}
    assert line["failures"] == ["tests/a.py::test_one[x - y]", "tests/b.py::test_two"] and line["exit"] == 2
    assert line["versions"] == {"python": "3.10.4", "torch": "2.15.0", "triton": "3.9.0"}
    assert (line["suite"], line["commit"]) == ("test", "abc1234") and line["machine"] and line["minutes"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"])
    text = page(monkeypatch, suite)
    assert "| `test` | python 3.10.4, torch 2.15.0, triton 3.9.0 |" in text and "| 5581 | 1 | 2 | 3 |" in text
    assert "- `tests/a.py::test_one[x - y]`" in text and "Nothing failed" not in text


def test_one_suite_that_fails_does_not_keep_the_next_from_running(suite, monkeypatch):
    assert evidence.main("test", "sanitize") == 2
    failed, clean = recorded(suite)
    assert (failed["exit"], clean["exit"], clean["suite"]) == (2, 0, "sanitize")
    # A suite that names no versions ran in this environment.
    assert clean["versions"]["torch"] == evidence.metadata.version("torch")


def test_the_page_shows_the_last_run_of_each_suite(suite, monkeypatch):
    evidence.main("test")
    # As the sanitizers' suite writes it, and as pytest does.
    (suite.parent / "output.txt").write_text(
        "operators: 3 passed, 1 warning in 897.91s (0:14:57)\n= 4 passed in 1.00s =\n"
    )
    (suite.parent / "Makefile").write_text("test:\n\t@cat output.txt\n")
    evidence.main("test")
    assert len(recorded(suite)) == 2
    text = page(monkeypatch, suite)
    assert text.count("| `test` |") == 1 and "| 7 | 0 | 0 | 0 |" in text and "Nothing failed in the runs above." in text


def test_an_interrupted_run_leaves_the_record_as_it_was(suite, monkeypatch):
    evidence.main("sanitize")
    before = suite.read_bytes()

    def interrupt(output: str) -> dict[str, int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "summary", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evidence.main("sanitize")
    assert suite.read_bytes() == before


def test_changes_that_are_not_committed_are_said(suite, monkeypatch):
    monkeypatch.setattr(evidence, "git", lambda *arguments: "abc1234" if arguments[0] == "rev-parse" else " M a.py")
    evidence.main("sanitize")
    assert recorded(suite)[0]["commit"] == "abc1234 with changes"


def test_a_suite_that_there_is_not_is_no_run(suite):
    with pytest.raises(SystemExit, match="no suite test-nothing: choose from test, "):
        evidence.main("test", "test-nothing")
    assert not suite.exists()


def test_nothing_is_claimed_without_a_run(monkeypatch, tmp_path):
    (tmp_path / "evidence.jsonl").write_text("")
    text = page(monkeypatch, tmp_path / "evidence.jsonl")
    assert "No run has been recorded yet." in text and "Nothing failed" not in text
