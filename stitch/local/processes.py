"""Processes that outlive the command that started them: spawn, watch, signal, stop. Doesn't know what they do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.05
# The system takes its time to give back a large process's memory.
KILLED_SECONDS = 20.0


@dataclass(slots=True)
class LocalProcess:
    """A process by its id and its birth, so that another one that got the same id later is not mistaken for it."""

    name: str
    pid: int
    # Clock ticks since the machine started; None on systems without /proc.
    birth: int | None
    # Known once a child of this program has ended; negative: the signal that ended it.
    exit_code: int | None = field(default=None, compare=False)

    def running(self) -> bool:
        """Whether it runs still."""
        if self.exit_code is not None:
            return False
        if self._is_child():
            return self.exit_code is None
        return _birth(self.pid) == self.birth if Path("/proc/self").exists() else _exists(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self.running():
            os.kill(self.pid, number)

    def wait(self, timeout_seconds: float) -> bool:
        """Whether it has ended within that time."""
        deadline = time.monotonic() + timeout_seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _is_child(self) -> bool:
        """Whether this program has started it; notes its exit code where it has just ended."""
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
    # A session of its own: Ctrl-C in the terminal reaches this program alone, which then stops the others in order.
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=redirections, setsid=True)
    return LocalProcess(name, pid, _birth(pid))


def stop(processes: Sequence[LocalProcess], grace_seconds: float) -> None:
    """Stops them together: SIGTERM in their order, and SIGKILL for those that still run after the grace time."""
    for process in processes:
        process.send(signal.SIGTERM)
        # A process that is paused gets the SIGTERM once it goes on.
        process.send(signal.SIGCONT)
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        if not process.wait(deadline - time.monotonic()):
            process.send(signal.SIGKILL)
            process.wait(KILLED_SECONDS)


def _birth(pid: int) -> int | None:
    """When the process began; None where it is gone, or only its exit status is left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may contain anything; state is field 3, start time field 22 (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
