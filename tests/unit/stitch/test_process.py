"""One signal lets things finish, a second one does not."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from stitch.errors import Unavailable
from stitch.process import InFlightTracker, StopSignals


async def test_the_first_signal_is_told_from_the_second() -> None:
    signals = StopSignals()
    signals.received()
    assert (signals.first.is_set(), signals.second.is_set()) == (True, False)
    signals.received()
    assert signals.second.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_real_signal_arrives(number: int) -> None:
    signals = StopSignals()
    signals.install()
    try:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(signals.first.wait(), timeout=10)
    finally:
        for installed in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(installed)


async def test_draining_ends_by_itself() -> None:
    drained = []

    async def drain() -> None:
        drained.append(True)

    await StopSignals().drained(drain())
    assert drained


async def test_a_second_signal_ends_the_draining() -> None:
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
