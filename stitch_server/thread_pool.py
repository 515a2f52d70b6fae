"""The threads on which compiled kernels run: `run_on_thread_pool` calls one kernel on several threads at once.

Takes a kernel that divides its own work into tasks, and returns when all tasks are done. One pool serves the process,
with as many threads as it has CPUs, so the helpers of one call never wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from stitch_server.cpu import Indices, new_task_counts

_helpers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")


def run_on_thread_pool(kernel: Callable[[int, Indices], None]) -> None:
    """Calls `kernel(threads, task_counts)` on `torch.get_num_threads()` threads, the caller's included.

    Returns when the caller's own call does, which is after the last task. A helper that starts later finds no task.
    """
    threads, counts = torch.get_num_threads(), new_task_counts()
    for _ in range(threads - 1):
        _helpers.submit(kernel, threads, counts)
    kernel(threads, counts)
