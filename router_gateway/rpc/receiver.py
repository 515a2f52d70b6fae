"""Receives the requests of calls within limits: calls and bytes are counted before anything is parsed.

A call's message is read only when the call has room, so that what clients send at the same time takes bounded memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from stitch.cluster import GatewayLimits
from stitch.errors import Exhausted, Expired, InvalidRequest

Context = grpc.aio.ServicerContext[Any, Any]


class Receiver:
    """Counts the calls that run and the bytes of their requests."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._calls = 0
        self._bytes = 0
        # First come, first served; a client that leaves while it waits leaves the queue.
        self._receiving = asyncio.Semaphore(limits.receiving_calls)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts a call within the block. Raises Exhausted where the most calls run."""
        if self._calls >= self._limits.calls:
            raise Exhausted(f"this gateway runs {self._calls:,} calls, its most")
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def receive(self, context: Context) -> bytes:
        """The call's message. Raises Expired where it takes too long, and InvalidRequest where there is none."""
        seconds = self._limits.receive_seconds
        async with self._receiving:
            try:
                async with asyncio.timeout(seconds):
                    data = await context.read()
            except TimeoutError as error:
                raise Expired(f"the request has not arrived within {seconds:g} s") from error
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
