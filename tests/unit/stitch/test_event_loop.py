"""A loop that is kept busy shows in the metric."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry, Histogram

from stitch.event_loop import observe_delay
from tests.support.waiting import eventually


async def test_a_blocked_loop_is_late() -> None:
    registry = CollectorRegistry()
    delay = Histogram("delay", "how late", registry=registry)

    def value(part: str) -> float:
        return registry.get_sample_value(f"delay_{part}") or 0.0

    observing = asyncio.create_task(observe_delay(delay, interval_seconds=0.001))
    try:
        await eventually(lambda: value("count") >= 1)
        before = value("sum")
        # Blocks the loop on purpose.
        time.sleep(0.05)  # noqa: ASYNC251
        await eventually(lambda: value("sum") - before >= 0.04)
    finally:
        observing.cancel()
