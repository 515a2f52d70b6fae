"""Tells a pass that is stuck from one that is long, by the passes before it.

In: the beginning and end of every pass, from the engine's thread, and ticks at a fixed interval, from the event loop.
Out: whether the present pass is overdue or stuck. Time in which this process doesn't run, such as while it is stopped,
doesn't count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

TICK_SECONDS = 0.25
# A pass is overdue, and stuck, when it takes this long and this many times as long as the longest one before. A GPU
# captures its CUDA graphs in passes; CPU kernels are compiled before the first one.
OVERDUE_SECONDS, OVERDUE_FACTOR = 15.0, 10.0
STUCK_SECONDS, STUCK_FACTOR = 120.0, 50.0


@dataclass(slots=True)
class PassAge:
    """How long the passes of one engine take."""

    clock: Callable[[], float] = time.monotonic
    # Set in the engine's thread: how many passes have ended, and whether one runs.
    ended: int = 0
    computing: bool = False
    # How long the present pass has taken, and the longest one before, in seconds.
    _seconds: float = 0.0
    _longest: float = 0.0
    _seen: int = 0
    _ticked_at: float | None = None

    @property
    def is_overdue(self) -> bool:
        """Whether upstream shards should no longer wait for the present pass; never in the first one."""
        return self._seen > 0 and self._seconds > max(OVERDUE_SECONDS, OVERDUE_FACTOR * self._longest)

    @property
    def is_stuck(self) -> bool:
        """Whether the present pass will never end."""
        return self._seconds > max(STUCK_SECONDS, STUCK_FACTOR * self._longest)

    def begin(self) -> None:
        self.computing = True

    def end(self) -> None:
        self.computing = False
        self.ended += 1

    def tick(self) -> None:
        """Counts the time since the last tick, at most two intervals: what is longer, this process did not run."""
        now = self.clock()
        passed = 0.0 if self._ticked_at is None else min(now - self._ticked_at, 2 * TICK_SECONDS)
        self._ticked_at = now
        if self.ended != self._seen:
            self._longest = max(self._longest, self._seconds)
            self._seen, self._seconds = self.ended, 0.0
        elif self.computing:
            self._seconds += passed
