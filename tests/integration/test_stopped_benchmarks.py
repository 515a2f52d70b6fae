"""A benchmark that receives SIGTERM leaves its context managers in order."""

from __future__ import annotations

import subprocess
import sys

# The `finally` block stands for that of a cluster, which stops its processes.
BENCHMARK = """
import asyncio
from benchmarks.clusters import run

async def measure():
    try:
        print("started", flush=True)
        await asyncio.Event().wait()
    finally:
        print("stopped", flush=True)

run(measure())
"""


def test_sigterm_runs_the_cleanup_of_a_benchmark() -> None:
    with subprocess.Popen([sys.executable, "-c", BENCHMARK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.stdout.read() == "stopped\n"
        assert process.wait() != 0
