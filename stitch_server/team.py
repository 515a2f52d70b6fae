"""A team of threads that call a compiled kernel together; it divides its work itself. Knows no array but its counts."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from stitch_server.cpu.scalars import Indices
from stitch_server.cpu.tasks import task_counts

# As many as may be asked for: helpers of one pass must not wait for each other.
_helpers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="team")


def run_in_team(function: Callable[[int, Indices], None]) -> None:
    """Calls `function` on as many threads as PyTorch has in this one, with their number and counts of its tasks.

    Returns when this thread's call does, by when all tasks are done. A helper that comes later finds none.
    """
    threads, counts = torch.get_num_threads(), task_counts()
    for _ in range(threads - 1):
        _helpers.submit(function, threads, counts)
    function(threads, counts)
