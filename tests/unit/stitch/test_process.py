"""Stop signals, the tracker of calls in flight, and the event loop's delay."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram

from stitch.errors import Unavailable
from stitch.process import InFlightTracker, StopSignals, background_tasks, observe_event_loop
from tests.support.waiting import eventually


async def test_stop_signals_count_first_and_second_signal() -> None:
    signals = StopSignals()
    signals.received()
    assert (signals.first.is_set(), signals.second.is_set()) == (True, False)
    signals.received()
    assert signals.second.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stop_signals_receive_operating_system_signals(number: int) -> None:
    signals = StopSignals()
    signals.install()
    try:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(signals.first.wait(), timeout=10)
    finally:
        for installed in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(installed)


async def test_drained_returns_when_drain_is_done() -> None:
    drained = []

    async def drain() -> None:
        drained.append(True)

    await StopSignals().drained(drain())
    assert drained


async def test_second_signal_cancels_drain() -> None:
    signals = StopSignals()
    began = asyncio.Event()
    cancelled = []

    async def drain() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    draining = asyncio.create_task(signals.drained(drain()))
    await began.wait()
    signals.received()
    signals.received()
    await draining
    assert cancelled


async def test_observe_delay_reports_blocked_event_loop() -> None:
    registry = CollectorRegistry()
    delay = Histogram("delay", "how late", registry=registry)
    tasks = Gauge("tasks", "how many", registry=registry)

    def value(suffix: str) -> float:
        return registry.get_sample_value(f"delay_{suffix}") or 0.0

    observing = asyncio.create_task(observe_event_loop(delay, tasks, interval_seconds=0.001))
    try:
        await eventually(lambda: value("count") >= 1)
        before = value("sum")
        # Blocks the loop on purpose.
        time.sleep(0.05)  # noqa: ASYNC251
        await eventually(lambda: value("sum") - before >= 0.04)
        assert registry.get_sample_value("tasks") == 2
    finally:
        observing.cancel()


async def test_closed_tracker_refuses_new_calls_and_waits_for_running_ones() -> None:
    tracker = InFlightTracker("this gateway")
    with tracker.admit():
        tracker.close()
        empty = asyncio.create_task(tracker.wait_until_empty())
        with pytest.raises(Unavailable, match="this gateway is shutting down"), tracker.admit():
            pass
        await asyncio.sleep(0)
        assert not empty.done()
    await empty


async def test_tracker_without_calls_is_empty_also_after_a_call_that_raised() -> None:
    tracker = InFlightTracker("this gateway")
    await tracker.wait_until_empty()
    with pytest.raises(KeyError), tracker.admit():
        raise KeyError
    await tracker.wait_until_empty()


async def test_work_ends_with_its_block() -> None:
    began, ended = asyncio.Event(), []

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with background_tasks(work()):
        await began.wait()
        assert not ended
    assert ended


async def test_a_failure_is_logged_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    failed, finish = asyncio.Event(), asyncio.Event()
    done = asyncio.Event()

    async def fails() -> None:
        failed.set()
        raise ZeroDivisionError

    async def works() -> None:
        await finish.wait()
        done.set()

    async with background_tasks(fails(), works()):
        await failed.wait()
        finish.set()
        await done.wait()
    assert "failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
