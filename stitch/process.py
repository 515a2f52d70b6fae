"""How a server process stops, its background tasks, and how late its event loop runs.

The first signal to stop starts the drain, a second one ends it at once. A drain closes the tracker of calls in flight,
which refuses new calls, and waits until the running ones have left.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from prometheus_client import Gauge, Histogram

from stitch.errors import Draining

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DELAY_INTERVAL_SECONDS = 0.25


class StopSignals:
    """Counts the signals to stop that this process receives; call `install` on its event loop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.received)

    def received(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    async def drained(self, drain: Awaitable[None]) -> None:
        """Returns when `drain` is done or the second signal has arrived, whichever is first."""
        work = asyncio.ensure_future(drain)
        second = asyncio.create_task(self.second.wait())
        await asyncio.wait({work, second}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, second):
            task.cancel()
        await asyncio.gather(work, second, return_exceptions=True)


class InFlightTracker:
    """Counts the calls of a process that run now; once closed, it admits no more."""

    def __init__(self, name: str) -> None:
        """`name` is what a refusal calls the process, such as `this gateway`."""
        self._name = name
        self._running = 0
        self._empty = asyncio.Event()
        self._empty.set()
        # Whether new calls are refused.
        self.closed = False
        # Whether running calls are being ended before they finish.
        self.aborting = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Counts a call for the length of the block. Raises Draining where the tracker is closed."""
        if self.closed:
            raise Draining(f"{self._name} is shutting down")
        self._running += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._empty.set()

    def close(self) -> None:
        """Refuses every call from now on; running ones go on."""
        self.closed = True

    async def wait_until_empty(self) -> None:
        """Returns when no call runs."""
        await self._empty.wait()


@asynccontextmanager
async def background_tasks(*coroutines: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Runs coroutines within the block and cancels them at its end; one that fails is logged and stops no other."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(log_failure)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def log_failure(task: asyncio.Task[Any]) -> None:
    """Logs why a background task has ended, as the callback of its end."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("%s failed", task.get_coro(), exc_info=error)


async def observe_event_loop(delay: Histogram, tasks: Gauge, interval_seconds: float = DELAY_INTERVAL_SECONDS) -> None:
    """Sleeps in an endless loop; observes by how many seconds each sleep was too long, and sets the number of tasks."""
    while True:
        due = time.perf_counter() + interval_seconds
        await asyncio.sleep(interval_seconds)
        delay.observe(max(0.0, time.perf_counter() - due))
        tasks.set(len(asyncio.all_tasks()))
