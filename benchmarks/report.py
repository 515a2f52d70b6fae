"""The options and the report of every benchmark: samples, medians, ratios, commit and machine, as a table and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# The exit code of a benchmark that this machine can't run, as in automake's tests.
SKIPPED = 77


@dataclass(frozen=True, slots=True)
class Options:
    """The options of every benchmark."""

    tiny: bool
    out: Path


def flags(question: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks share; `question` is the description for `--help`."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--tiny", action="store_true", help="a few samples, to see that it runs")
    default = Path("build/benchmarks/out.json")
    parser.add_argument("--out", metavar="FILE.json", type=Path, default=default, help="for the samples")
    return parser


def options(question: str) -> Options:
    """Parses the command line of a benchmark with no flags of its own."""
    parsed = flags(question).parse_args()
    return Options(parsed.tiny, parsed.out)


def ratio(candidate: Sequence[float], baseline: Sequence[float]) -> float:
    """The ratio of the medians of two candidates, which were sampled in alternation."""
    return median(candidate) / median(baseline)


def write(options: Options, samples: Mapping[str, Sequence[float]], ratios: Mapping[str, float], **more: Any) -> None:
    """Prints medians and ratios and writes everything as JSON. A name ends with the unit of its samples."""
    for name, values in samples.items():
        print(f"  {name:<40} {median(values):10.2f}   ({min(values):.2f} to {max(values):.2f}, {len(values)} samples)")
    for name, value in ratios.items():
        print(f"  {name:<40} {value:10.3f} x", flush=True)
    report = {"commit": _commit(), "machine": _machine(), "samples": samples, "ratios": ratios, **more}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def _commit() -> str:
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"


def _machine() -> dict[str, Any]:
    return {"cores": len(os.sched_getaffinity(0)), "cpu": platform.machine(), "python": platform.python_version()}
