"""Repeats a request while the gateway has no room: a program with many prompts waits, instead of losing some."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from stitch.client.answers import Answer
from stitch.errors import Exhausted

# A full gateway is asked again after the time that it names, up to this many times.
MAX_ATTEMPTS = 20


async def until_room(ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """Returns the answer. Raises what `ask` raises, and Exhausted only from the last attempt."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await ask()
        except Exhausted as full:
            await asyncio.sleep(full.retry_after_seconds)
    return await ask()
