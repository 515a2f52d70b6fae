"""A loop that is kept busy shows in the metric."""

from __future__ import annotations

import time

from router_gateway.background import running
from router_gateway.event_loop import observe_delay
from router_gateway.metrics import Metrics
from tests.support.waiting import eventually


async def test_a_blocked_loop_is_late() -> None:
    metrics = Metrics(["weak"], ["length"])

    def value(part: str) -> float:
        found = metrics.registry.get_sample_value(f"stitch_event_loop_delay_seconds_{part}")
        return found or 0.0

    async with running(observe_delay(metrics.event_loop_delay, interval_seconds=0.001)):
        await eventually(lambda: value("count") >= 1)
        before = value("sum")
        # Blocks the loop on purpose.
        time.sleep(0.05)  # noqa: ASYNC251
        await eventually(lambda: value("sum") - before >= 0.04)
