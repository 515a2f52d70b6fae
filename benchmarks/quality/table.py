"""Makes the table of a cluster: times every route by weights of every kind, then measures how good each is.

    python -m benchmarks.quality.table CLUSTER --out table.json --data … --prompts … --gold … --controls …

All further flags are those of `stitch-train evaluate`. The times are beside the table, in table.times.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.bench_routes import KINDS


def main() -> None:
    """Runs both programs; each prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or the name of a preset")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .json file")
    parsed, more = parser.parse_known_args()
    times = parsed.out.with_suffix(".times.json")
    timing = ["benchmarks.bench_routes", "--cluster", parsed.cluster, "--out", times]
    given = ["--timings", times, "--quantizations", *(kind for kind in KINDS if kind != "none"), "--out", parsed.out]
    for command in (timing, ["stitch_training.cli", "evaluate", parsed.cluster, *more, *given]):
        subprocess.run([sys.executable, "-m", *map(str, command)], check=True)


if __name__ == "__main__":
    main()
