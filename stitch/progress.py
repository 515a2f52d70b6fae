"""A line on standard error that shows how far a long task is, with an estimate of the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO


class ProgressLine:
    """Rewrites one line on a terminal; elsewhere it prints a line for every tenth of a task."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Prints to `stream`; None: standard error."""
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._task, self._started_at, self._first, self._tenth = "", 0.0, 0, -1

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._is_terminal and self._task:
            self._stream.write("\n")

    def __call__(self, task: str, done: int, total: int) -> None:
        """Shows that `done` of `total` units of `task` are done."""
        if task != self._task:
            self._task, self._started_at, self._first, self._tenth = task, time.monotonic(), done, -1
        tenth = 10 * done // max(total, 1)
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{self._line(done, total)}")
        elif tenth > self._tenth:
            self._stream.write(self._line(done, total) + "\n")
        self._tenth = tenth
        self._stream.flush()

    def _line(self, done: int, total: int) -> str:
        elapsed = time.monotonic() - self._started_at
        remaining = (total - done) * elapsed / (done - self._first) if done > self._first else 0.0
        return f"{self._task}: {done} of {total}" + (f", {remaining:.0f} s to go" if remaining else "")
