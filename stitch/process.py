"""From the first signal to the end: drain, then stop; a second signal stops at once. Knows no request."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Counts the signals to stop that this process gets; call `install` on its event loop."""

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
        """Returns once `drain` is done, or the second signal came."""
        work = asyncio.ensure_future(drain)
        second = asyncio.create_task(self.second.wait())
        await asyncio.wait({work, second}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, second):
            task.cancel()
        await asyncio.gather(work, second, return_exceptions=True)
