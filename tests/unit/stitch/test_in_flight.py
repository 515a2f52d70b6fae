"""Who is inside stays to the end; who comes late is sent away."""

from __future__ import annotations

import asyncio

import pytest

from stitch.errors import Unavailable
from stitch.in_flight import InFlightTracker


async def test_a_closed_door_waits_for_those_inside() -> None:
    door = InFlightTracker()
    with door.passed():
        door.close()
        empty = asyncio.create_task(door.empty())
        with pytest.raises(Unavailable, match="shutting down"), door.passed():
            pass
        await asyncio.sleep(0)
        assert not empty.done()
    await empty


async def test_nobody_inside_is_empty_at_once() -> None:
    door = InFlightTracker()
    await door.empty()
    with pytest.raises(KeyError), door.passed():
        raise KeyError
    await door.empty()
