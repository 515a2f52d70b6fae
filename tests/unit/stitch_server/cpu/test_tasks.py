"""Threads that share a call do each task once, and none before the previous stage is done."""

from __future__ import annotations

from threading import Thread

import numpy as np
import pytest

from stitch_server.cpu import Indices
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.tasks import first_task, new_task_counts, next_task, wait_for

pytestmark = pytest.mark.slow

STAGES, TASKS = 400, 7


@compiled(cache=False)
def work(sums: Indices, taken: Indices, counts: Indices) -> None:
    """Each task adds up what all tasks of the previous stage have written."""
    done, task = 0, first_task(counts)
    for stage in range(1, STAGES + 1):
        stage_end = done + TASKS
        if task < stage_end:
            wait_for(counts, done)
        while task < stage_end:
            taken[task] += 1
            sums[stage, task - done] = sums[stage - 1].sum() % 1_000_003
            task = next_task(counts)
        done = stage_end
    wait_for(counts, done)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_stage_begins_after_the_previous_one(threads: int) -> None:
    sums, taken = np.zeros((STAGES + 1, TASKS), np.int64), np.zeros(STAGES * TASKS, np.int64)
    sums[0] = 1
    counts = new_task_counts()
    helpers = [Thread(target=work, args=(sums, taken, counts)) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work(sums, taken, counts)
    expected, value = [7 % 1_000_003], 7
    for _ in range(STAGES - 1):
        value = value * TASKS % 1_000_003
        expected.append(value)
    assert (sums[1:] == np.array(expected)[:, None]).all()
    for helper in helpers:
        helper.join()
    assert (taken == 1).all()


def test_late_helper_finds_no_task() -> None:
    sums, taken = np.zeros((STAGES + 1, TASKS), np.int64), np.zeros(STAGES * TASKS, np.int64)
    counts = new_task_counts()
    work(sums, taken, counts)
    sums[:] = -1
    work(sums, taken, counts)
    assert (taken == 1).all()
    assert (sums == -1).all()
