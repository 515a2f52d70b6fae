"""A benchmark that is told to end stops what it has started."""

from __future__ import annotations

import subprocess
import sys

# A block that, like that of a cluster, must be left in order.
BENCHMARK = """
import asyncio
from benchmarks.clusters import run

async def measure():
    try:
        print("begun", flush=True)
        await asyncio.Event().wait()
    finally:
        print("stopped", flush=True)

run(measure())
"""


def test_sigterm_leaves_its_blocks() -> None:
    with subprocess.Popen([sys.executable, "-c", BENCHMARK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.stdout.read() == "stopped\n"
        assert process.wait() != 0
