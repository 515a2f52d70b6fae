"""Queues of texts to tokenize and of grammars: one for short texts, for which no long text and no grammar waits.

Each has one thread, comes first in, first out, and its predicted wait is bounded: a text that would wait longer is
refused with the time after which to try again. A caller that is cancelled while it waits leaves the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from types import TracebackType
from typing import Self, TypeVar

from stitch.errors import Exhausted

Result = TypeVar("Result")

# Tokenizing this much takes about a millisecond; more would delay other requests on the event loop.
INLINE_BYTES = 2_048
# Some 10 ms.
SHORT_BYTES = 32_768
# A grammar counts as a text whose tokenization takes as long at first: a few ms.
GRAMMAR_BYTES = 8_192
# Before the first text: 3 MB take a second.
SECONDS_PER_BYTE = 1 / 3e6
# The weight of the latest text in the rate.
_LATEST = 0.2


class TextQueues:
    """Calls functions that tokenize texts, in place for the shortest ones; a context manager that ends the threads."""

    def __init__(self, max_wait_seconds: float) -> None:
        self._short = _Queue("text", max_wait_seconds)
        self._long = _Queue("long-text", max_wait_seconds)
        self._grammars = _Queue("grammar", max_wait_seconds)

    async def run(self, size_bytes: int, tokenize: Callable[[], Result]) -> Result:
        """The result of `tokenize`, for a text of that size. Raises Exhausted where it would wait for too long."""
        if size_bytes <= INLINE_BYTES:
            return tokenize()
        return await (self._short if size_bytes <= SHORT_BYTES else self._long).run(size_bytes, tokenize)

    async def compile(self, compile: Callable[[], Result]) -> Result:
        """The result of a function that compiles a grammar. Raises Exhausted where it would wait for too long."""
        return await self._grammars.run(GRAMMAR_BYTES, compile)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for queue in (self._short, self._long, self._grammars):
            queue.thread.shutdown(cancel_futures=True)


class _Queue:
    def __init__(self, name: str, max_wait_seconds: float) -> None:
        self.thread = ThreadPoolExecutor(1, name)
        self._max_wait_seconds = max_wait_seconds
        self._seconds_per_byte = SECONDS_PER_BYTE
        # Of the text that is tokenized and of those that wait for it.
        self._bytes = 0
        # Its waiters come first in, first out, and leave when they are cancelled.
        self._turn = asyncio.Lock()

    async def run(self, size_bytes: int, tokenize: Callable[[], Result]) -> Result:
        wait_seconds = self._bytes * self._seconds_per_byte
        if wait_seconds > self._max_wait_seconds:
            message = f"texts to tokenize already wait for {wait_seconds:.1f} s"
            raise Exhausted(message, retry_after_seconds=wait_seconds)
        self._bytes += size_bytes
        try:
            async with self._turn:
                start = perf_counter()
                try:
                    return await asyncio.get_running_loop().run_in_executor(self.thread, tokenize)
                finally:
                    self._observe((perf_counter() - start) / size_bytes)
        finally:
            self._bytes -= size_bytes

    def _observe(self, seconds_per_byte: float) -> None:
        self._seconds_per_byte += _LATEST * (seconds_per_byte - self._seconds_per_byte)
