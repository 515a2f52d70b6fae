"""Tests of failover from shards without room: a new request is tried elsewhere, and a started answer waits."""

from __future__ import annotations

import asyncio
from itertools import count

import grpc
import pytest

from stitch.errors import Exhausted
from tests.support.fake_shard import END_TOKEN, aborts, raises, waits_for
from tests.support.token_streams import PROMPT, SCRIPT, bottoms, ids, stream_input, streaming, top
from tests.support.waiting import eventually

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


async def test_new_request_on_a_full_shard_is_exhausted() -> None:
    [bottom] = bottoms(1)
    bottom.faults[0] = raises(Exhausted("no room", 2.5))
    async with streaming(bottom, top()) as stream:
        with pytest.raises(Exhausted) as caught:
            await stream.all()
    assert caught.value.retry_after_seconds == 2.5
    assert stream.replays == {}


async def test_started_answer_waits_for_room() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[2] = aborts(UNAVAILABLE)
    second.faults[2] = raises(Exhausted("no room", 9.0))
    async with streaming(first, second, top()) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {"unavailable": 1}


async def test_started_answer_without_room_is_exhausted_after_max_failures() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[2] = aborts(UNAVAILABLE)
    second.faults[2] = raises(Exhausted("no room", 9.0))
    async with streaming(first, second, top(), max_failures=1) as stream:
        with pytest.raises(Exhausted):
            await stream.all()


class TestRoom:
    async def test_new_request_is_tried_on_another_chain(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.faults[0] = raises(Exhausted("no room", 2.5))
        async with streaming(first, second, top(), max_failures=0) as stream:
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert stream.replays == {}
            assert not stream.replica("bottom-0").avoided

    async def test_new_request_is_refused_after_one_try_of_each_chain(self) -> None:
        shards = bottoms(3)
        for shard in shards:
            shard.faults[0] = raises(Exhausted("no room", 2.5))
        # However long the tries take: every look at the clock is a second later.
        async with streaming(*shards, top(), clock=count(1.0).__next__) as stream:
            with pytest.raises(Exhausted, match="no room"):
                await stream.all()
        assert [len(shard.requests) for shard in shards] == [1, 1, 1]

    async def test_kv_is_reserved_until_the_answer_ends(self) -> None:
        [bottom] = bottoms(1)
        hold = asyncio.Event()
        bottom.faults[2] = waits_for(hold)
        async with streaming(bottom, top()) as stream:
            answer = asyncio.create_task(stream.all(stream_input(max_tokens=50)))
            await eventually(lambda: not bottom.faults)
            assert stream.replica("top-0").load.free_tokens == 10_000 - len(PROMPT) - 50
            hold.set()
            await answer
            assert stream.replica("top-0").load.free_tokens == 10_000
