"""Who may come in, and when the last one has left. Knows nothing of signals and servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from stitch.errors import Unavailable


class InFlightTracker:
    """Counts the calls inside; once closed, nobody else comes in."""

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        # Whether newcomers are sent away.
        self.closed = False
        # Whether those inside are being sent away before their end.
        self.cleared = False

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Inside for the length of the block. Raises Unavailable where the door is closed."""
        if self.closed:
            raise Unavailable("this gateway is shutting down")
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def close(self) -> None:
        self.closed = True

    async def empty(self) -> None:
        """Returns once nobody is inside."""
        await self._empty.wait()
