"""Tests of the folder of compiled code: one process compiles, for every copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
# Prints how many functions this process has compiled.
PROGRAM = """
from stitch_server.cpu.tasks import new_task_counts, next_task
next_task(new_task_counts())
print(sum(next_task.stats.cache_misses.values()))
"""


@pytest.mark.slow
def test_function_is_compiled_once_for_all_processes_and_copies(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for package in ("stitch", "stitch_server"):
        shutil.copytree(ROOT / package, copy / package)
    environment = {**os.environ, "STITCH_CACHE": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**environment, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for root in (ROOT, copy)
    ]
    assert sorted(process.communicate()[0].strip() for process in running) == ["0", "1"]
