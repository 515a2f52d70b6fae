"""Processes that outlive the command that started them: it spawns, signals, awaits and stops them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

POLL_SECONDS = 0.05
# Freeing the memory of a large process takes seconds.
KILLED_SECONDS = 20.0


@dataclass(slots=True)
class LocalProcess:
    """A process by its id and its start time, since the system may give the same id to another process later."""

    name: str
    pid: int
    # Seconds from the machine's boot to the process's start; None: it had ended before this was read.
    start_seconds: float | None
    # Set when a child of this program has ended; negative: the signal that ended it.
    exit_code: int | None = field(default=None, compare=False)

    def running(self) -> bool:
        """Whether the process still runs."""
        if self.exit_code is not None:
            return False
        if self._is_child():
            return self.exit_code is None
        return self.start_seconds is not None and start_seconds(self.pid) == self.start_seconds

    def send(self, number: signal.Signals) -> None:
        """Sends a signal if the process still runs."""
        if self.running():
            os.kill(self.pid, number)

    def wait(self, timeout_seconds: float) -> bool:
        """Waits for the process to end; returns whether it did within that time."""
        deadline = time.monotonic() + timeout_seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _is_child(self) -> bool:
        """Whether this program is its parent; sets the exit code where the process has just ended."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == self.pid:
            self.exit_code = os.waitstatus_to_exitcode(status)
        return True


def spawn(name: str, module: str, arguments: Sequence[str], log: Path) -> LocalProcess:
    """Starts `python -m module arguments` in a session of its own, with its output appended to `log`."""
    command = [sys.executable, "-m", module, *arguments]
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    redirections = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # Ctrl-C in the terminal signals the session of this program alone, which then stops the processes in order.
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=redirections, setsid=True)
    return LocalProcess(name, pid, start_seconds(pid))


def stop(processes: Sequence[LocalProcess], grace_seconds: float) -> None:
    """Stops processes together: SIGTERM in their order, SIGKILL for those that still run after the grace time."""
    for process in processes:
        process.send(signal.SIGTERM)
        # A paused process receives SIGTERM only when it continues.
        process.send(signal.SIGCONT)
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        if not process.wait(deadline - time.monotonic()):
            process.send(signal.SIGKILL)
            process.wait(KILLED_SECONDS)


def start_seconds(pid: int) -> float | None:
    """Seconds from the machine's boot to the start of the process; None where it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        # Unlike the time of day this doesn't change when the system's clock is set. Linux counts 0.01 s.
        return round(process.create_time() - psutil.boot_time(), 2)
    except psutil.NoSuchProcess:
        return None
