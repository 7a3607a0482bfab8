"""Stands for compute-sanitizer in a rehearsal: writes down what it was asked, and runs the program without watching."""

from __future__ import annotations

import subprocess
import sys

from bench.gpu import record


def main(arguments: list[str]) -> int:
    begin = arguments.index(sys.executable)
    record("sanitizer", options=arguments[:begin], program=arguments[begin + 1 :])
    return subprocess.run(arguments[begin:], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
