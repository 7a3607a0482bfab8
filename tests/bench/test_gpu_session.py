"""`make gpu` without a GPU: its plan with planted faults, the evidence that remains, and the page drawn from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import charts
from bench.gpu import report
from bench.gpu.parts import parts
from bench.gpu.session import ROOT, Part, Session

PLAN = parts("9.0a")
GROUPS = [
    "smoke, Triton",
    "smoke, CUDA",
    "engine",
    "profile",
    "7B and rivals",
    "operators",
    "tests",
    "sanitizers",
    "tune",
]
EVIDENCE = "from bench.gpu import record; record('evidence', number=1); record('evidence', number=2); print('done')"
HANGS = "from bench.gpu import record; record('evidence', number=1); import time; print('hangs', flush=True); " + (
    "time.sleep(600)"
)
CRASHES = "from bench.gpu import record; record('evidence', number=1); import os; os.abort()"
# A grandchild in a session of its own, which outlives its parent and ignores what it can.
SURVIVES = (
    "import subprocess, sys; from bench.gpu import record; record('evidence', number=1); "
    "subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "time.sleep(600)'], start_new_session=True); record('evidence', number=2)"
)


def of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def running(mark: Path) -> list[str]:
    """Processes whose environment names this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(mark).encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_the_plan_is_whole_and_fits():
    assert list(dict.fromkeys(part.group for part in PLAN)) == GROUPS
    assert len({part.name for part in PLAN}) == len(PLAN)
    # The headline is measured in the first four minutes, whatever else happens.
    begun, seconds = 0.0, 0.0
    for part in PLAN:
        if part.background:
            continue
        begun, seconds = (begun, max(seconds, part.limit)) if part.beside else (begun + seconds, part.limit)
        if part.group == "engine":
            assert begun + seconds <= 240
    names = [part.name for part in PLAN]
    assert all(part.needs in names[: names.index(part.name)] for part in PLAN if part.needs)


def test_planted_faults_cost_nobody_else_anything(tmp_path):
    """The whole plan, every command a stand-in: one hangs, one crashes, one leaves a child behind."""
    faults = {"decode 2b": HANGS, "operators": CRASHES, "tests": SURVIVES, "smoke triton append_visual_kv": HANGS}
    plan = [replace(part, command=python(faults.get(part.name, EVIDENCE))) for part in PLAN]
    begin = time.monotonic()
    ended = Session(tmp_path, 50, scale=1 / 25).run(plan)
    assert time.monotonic() - begin < 50
    lines = of(tmp_path)
    assert {name for name, ok in ended.items() if not ok} == {"decode 2b", "operators", "smoke triton append_visual_kv"}
    for part in plan:
        evidence = [line["number"] for line in lines if line["part"] == part.name and line["name"] == "evidence"]
        assert evidence == ([1] if not ended[part.name] else [1, 2]), part.name
        (end,) = [line for line in lines if line["part"] == part.name and line["name"] == "end"]
        assert end["ok"] == ended[part.name] and end["group"] == part.group
    ends = {line["part"]: line for line in lines if line["name"] == "end"}
    assert "stopped after" in ends["decode 2b"]["summary"] and ends["decode 2b"]["tail"] == ["hangs"]
    assert ends["operators"]["status"] == -6
    assert ends["tests"]["left behind"] == 1 and running(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.txt", "results.jsonl"]
    logs = (tmp_path / "logs.txt").read_text()
    assert all(f"===== {part.name}: " in logs for part in plan)


def test_another_session_s_part_of_the_same_name_is_left_alone(tmp_path):
    environment = {**os.environ, "VPT_GPU_PART": "tests", "VPT_GPU_RESULTS_FILE": str(tmp_path / "other.jsonl")}
    other = subprocess.Popen(python("import time; time.sleep(60)"), env=environment, start_new_session=True)
    assert Session(tmp_path, 30).run([Part("tests", "tests", python("pass"), 20)]) == {"tests": True}
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_part_waits_for_what_it_needs_and_holds_nobody_up(tmp_path):
    slow = Part("build", "a", python("import time; time.sleep(2)"), 20, background=True)
    needing = Part("cuda", "a", python("pass"), 20, needs="build")
    quick = Part("engine", "b", python("pass"), 20)
    Session(tmp_path, 30).run([slow, needing, quick])
    assert [line["part"] for line in of(tmp_path)] == ["engine", "build", "cuda"]


def test_what_no_time_is_left_for_says_so(tmp_path):
    ended = Session(tmp_path, 1.0).run([Part("a", "a", python("pass"), 5, least=5)])
    assert ended == {"a": False} and "not run" in of(tmp_path)[0]["summary"]


def test_a_run_that_is_ended_leaves_its_results_and_no_process(tmp_path):
    code = (
        "from pathlib import Path; from bench.gpu.session import Part, Session; import sys; "
        f"Session(Path({str(tmp_path)!r}), 60).run([Part('ended early', 'a', (sys.executable, '-c', {HANGS!r}), 60)])"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 40
    while time.monotonic() < end and not (tmp_path / "results.jsonl").exists():
        time.sleep(0.1)
    run.terminate()
    assert run.wait(timeout=20) != 0
    lines = of(tmp_path)
    assert lines[0]["name"] == "evidence" and lines[-1]["summary"] == "stopped: the session ended"
    assert running(tmp_path) == []


def test_without_a_gpu_it_says_so(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "VPT_GPU_REHEARSAL"}
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "gpu-rehearsal" in done.stdout and not list(tmp_path.iterdir())


LINES = [
    {"part": "", "name": "environment", "gpu": "a GPU", "torch": "2.11", "commit": "abc", "date": "2026-01-01T00:00"},
    {"part": "decode 2b", "name": "gate", "preset": "2b", "error": 0.01, "top1": 0.95},
    {"part": "decode 2b", "name": "decode", "preset": "2b", "of_copy": 0.66, "replay_ms": 1.5, "events_ms": 1.6},
    {"part": "transformers 2b", "name": "decode", "preset": "2b", "rival": "compiled", "events_ms": 2.4},
    {"part": "looks 2b", "name": "look", "preset": "2b", "look": "clip", "ms": 7.0},
    {
        "part": "operators",
        "name": "operator",
        "call": "append, 54 tokens",
        "backend": "cuda",
        "us": {"ours": 5.0, "eager": 40.0, "copy": 4.0},
        "of_copy": 0.8,
    },
    {
        "part": "operators",
        "name": "operator",
        "call": "append, 4096 tokens",
        "backend": "cuda",
        "us": {"ours": 30.0, "eager": 90.0, "copy": 10.0},
        "of_copy": 1 / 3,
    },
    {"part": "looks 2b", "name": "gate", "preset": "2b", "replay": "clip", "error": 0.0, "same": "4 of 4"},
    {"part": "operators", "name": "operator", "call": "roi", "backend": "triton", "wrong": "WrongResult"},
    {"part": "profile 2b", "name": "profile", "preset": "2b", "of": "decode", "table": "kernel 1 us"},
    {"part": "tune", "name": "tuned", "kernel": "k", "size": "all", "chosen": None, "of": 3, "answers": {"1": 1}},
    {"part": "decode 2b", "name": "end", "ok": True, "seconds": 3.0, "summary": "a | b"},
]


def test_the_page_and_the_picture(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + '\n{"part": "half a li')
    lines = report.load(path)
    assert lines == LINES
    reached = {name: share for name, share, _ in report.targets(lines)}
    assert reached["decode 2b ≥ 60%"] == pytest.approx(1.1)
    assert reached["decode 2b, not slower than transformers compiled"] == pytest.approx(1.5)
    assert reached["look, clip ≤ 3.5 ms"] == 0.5 and reached["append, 54 tokens, cuda ≤ 10 µs"] == 2.0
    assert reached["append, 4096 tokens, cuda ≤ 1.5× its bytes"] == 0.5
    page = report.page(lines)
    assert "| 2b clip | 0.0e+00 | 4 of 4 |" in page
    assert "a / b" in page and "| roi | triton | WrongResult |" in page and "kernel 1 us" in page
    charts.targets(report.targets(lines), report.where(lines), tmp_path / "targets.svg")
    assert "Reached of each target" in (tmp_path / "targets.svg").read_text()
