"""Runs every benchmark, one after the other, each in a process of its own; exits with the number of failed ones."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.report import SKIPPED


def main() -> int:
    """Runs the benchmarks and returns the number of those that failed."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few samples each, to see that they run")
    parser.add_argument("--out", metavar="DIR", default="build/benchmarks", help="for JSON and plots")
    parsed = parser.parse_args()
    failed = 0
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"== {path.stem}", flush=True)
        flags = ["--tiny"] if parsed.tiny else []
        command = [sys.executable, "-m", f"benchmarks.{path.stem}", *flags, "--out", f"{parsed.out}/{path.stem}.json"]
        failed += subprocess.run(command, check=False).returncode not in (0, SKIPPED)
    return failed


if __name__ == "__main__":
    sys.exit(main())
