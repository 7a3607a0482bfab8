"""Runs whole suites and records each run as one line of docs/evidence.jsonl, from which docs/versions.md is made.

    python -m tests.evidence [suite …]     all suites that the Makefile has, or those named

A line holds the suite, commit, date, machine, versions, the counts of pytest's summaries, what failed and the minutes.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "evidence.jsonl"
SUITES = (
    "test",
    "test-full",
    "test-latest",
    "test-oldest",
    "test-vllm",
    "test-pythons",
    "sanitize",
    "test-page",
    "gpu-rehearsal",
)
"""Targets of the Makefile."""
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pillow", "numpy", "typer", "rich")
COUNTS = ("passed", "failed", "skipped", "errors")


def summary(output: str) -> dict[str, int]:
    """The sums of all of pytest's last lines: a suite runs it several times."""
    found = dict.fromkeys(COUNTS, 0)
    for line in re.findall(
        r"^(?:=+ |\w+: )?(\d+ (?:passed|failed|skipped|error).*) in [\d.]+s", output, flags=re.MULTILINE
    ):
        for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", line):
            found["errors" if kind == "error" else kind] += int(count)
    return found


def versions(output: str) -> dict[str, str]:
    """Of the packages that the suite has used: those it has printed itself, else those of this environment."""
    said = re.findall(r"^torch [\w.+]+, .*$", output, flags=re.MULTILINE)
    if said:
        found = dict(item.split(" ") for item in said[-1].split(", "))
    else:
        found = {name: metadata.version(name) for name in PACKAGES}
    pythons = re.findall(r"^Python (\d+\.\d+\.\d+)$", output, flags=re.MULTILINE)
    return {"python": " / ".join(dict.fromkeys(pythons)) or platform.python_version()} | found


def machine() -> str:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def run(suite: str) -> dict:
    """Run one suite, show what it says, and return its line."""
    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno", ":!docs")
    began, output = time.monotonic(), []
    command = ["make", "--no-print-directory", suite]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            output.append(line)
    text = "".join(output)
    return {
        "suite": suite,
        "commit": commit + (" with changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(text),
        **summary(text),
        "exit": process.returncode,
        "failures": re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+(?:\[.*?\](?= - |$))?)", text, flags=re.MULTILINE),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def record(line: dict) -> None:
    """Append one line in one write: an interruption leaves the whole of it or nothing."""
    with RECORD.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(line)}\n".encode())


def main(*chosen: str) -> int:
    unknown = set(chosen) - set(SUITES)
    if unknown:
        raise SystemExit(f"no suite {', '.join(sorted(unknown))}: choose from {', '.join(SUITES)}")
    status = 0
    for suite in chosen or SUITES:
        line = run(suite)
        record(line)
        status = status or line["exit"]
    return status


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
