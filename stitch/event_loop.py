"""Measures how late the event loop is. Knows nothing of what keeps it busy."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Histogram

INTERVAL_SECONDS = 0.25


async def observe_delay(delay: Histogram, interval_seconds: float = INTERVAL_SECONDS) -> None:
    """Sleeps again and again, for ever, and observes by how much each sleep was too long."""
    while True:
        due = time.perf_counter() + interval_seconds
        await asyncio.sleep(interval_seconds)
        delay.observe(max(0.0, time.perf_counter() - due))
