"""Receives the requests of calls within limits: calls and bytes are counted before anything is parsed.

The requests of calls that run have a budget of bytes. Calls whose request has not arrived are few, or young: beyond
their number the oldest ones are ended, so that neither silent nor slow clients keep memory or calls from others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from stitch.cluster import GatewayLimits
from stitch.errors import Exhausted, Expired, InvalidRequest

# A call may wait this long for its request, however many do.
GRACE_SECONDS = 1.0


class Receiver:
    """Counts the calls that run, and the bytes of their requests."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._calls = 0
        self._bytes = 0
        # The timeouts of calls that wait for their request with the times of their start, oldest first.
        self._waiting: dict[asyncio.Timeout, float] = {}

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts a call within the block. Raises Exhausted where the most calls run."""
        self._end_oldest_waits()
        if self._calls >= self._limits.calls:
            raise Exhausted(f"this gateway runs {self._calls:,} calls, its most")
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def receive(self, read: Callable[[], Awaitable[object]]) -> bytes:
        """What `read` returns. Raises Expired where it takes too long, and InvalidRequest where it is no bytes."""
        try:
            async with asyncio.timeout(self._limits.receive_seconds) as timeout:
                self._waiting[timeout] = asyncio.get_running_loop().time()
                try:
                    data = await read()
                finally:
                    del self._waiting[timeout]
        except TimeoutError as error:
            raise Expired("the request has not arrived in time") from error
        if not isinstance(data, bytes):
            raise InvalidRequest("request", None, "the call has none")
        return data

    @contextmanager
    def held(self, data: bytes) -> Iterator[None]:
        """Counts the bytes of a request within the block. Raises Exhausted where there is no room for them."""
        limit = self._limits.in_flight_bytes
        if self._bytes + len(data) > limit:
            raise Exhausted(f"the requests that run have {self._bytes:,} bytes of at most {limit:,}")
        self._bytes += len(data)
        try:
            yield
        finally:
            self._bytes -= len(data)

    def _end_oldest_waits(self) -> None:
        now = asyncio.get_running_loop().time()
        surplus = len(self._waiting) - self._limits.receiving_calls
        for timeout, since in islice(self._waiting.items(), max(0, surplus)):
            if now - since < GRACE_SECONDS:
                return
            if not timeout.expired():
                timeout.reschedule(now)
