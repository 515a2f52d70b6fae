"""Tests of failover from shards that drain: new sessions go elsewhere, and running ones end where they are."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from stitch.errors import Draining, Unavailable
from tests.support.fake_shard import END_TOKEN, FakeShard, aborts, raises, waits_for
from tests.support.token_streams import SCRIPT, bottoms, ids, stream_input, streaming, top
from tests.support.waiting import eventually

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class TestDraining:
    """A shard that began to drain between two polls refuses new sessions and keeps the running ones."""

    @pytest.mark.parametrize("role", ["bottom", "top"])
    async def test_refused_session_is_placed_on_another_chain_at_once(self, role: str) -> None:
        shards = [*bottoms(2), FakeShard("top-0", "top"), FakeShard("top-1", "top")]
        [draining] = [shard for shard in shards if shard.name == f"{role}-0"]
        draining.free_kv_tokens += 1
        async with streaming(*shards, max_failures=0) as stream:
            draining.draining = True
            if role == "top":
                # The first shard reports that the next one refuses.
                shards[0].faults[0] = raises(Draining("top-0 is draining"))
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays) == (1, {})
            assert not stream.replica(draining.name).accepts_requests
            assert stream.replica(draining.name).serving

    async def test_refusal_counts_as_one_where_the_poll_shows_no_draining_shard(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.faults[0] = raises(Draining("a shard of the chain is draining"))
        async with streaming(first, second, top(), max_failures=0) as stream:
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays, len(second.requests)) == (1, {}, 1)

    async def test_running_session_goes_on_and_new_one_is_placed_elsewhere(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        hold = asyncio.Event()
        first.faults[3] = waits_for(hold)
        async with streaming(first, second, top()) as stream:
            running = asyncio.create_task(stream.all())
            await eventually(lambda: first.running and not first.faults)
            first.draining = True
            await stream.refresh()
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert len(second.requests) == 1
            hold.set()
            assert ids(await running) == [*SCRIPT, END_TOKEN]
            assert (len(first.requests), stream.drain_refusals, stream.replays) == (1, 0, {})

    async def test_replay_is_not_placed_on_a_draining_replica(self) -> None:
        first, second, third = bottoms(3)
        first.free_kv_tokens += 2
        second.free_kv_tokens += 1
        first.faults[2] = aborts(UNAVAILABLE)
        async with streaming(first, second, third, top()) as stream:
            second.draining = True
            await stream.refresh()
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (len(second.requests), len(third.requests)) == (0, 1)
            assert stream.replays == {"unavailable": 1}

    async def test_replay_that_a_draining_replica_refuses_counts_once(self) -> None:
        first, second, third = bottoms(3)
        first.free_kv_tokens += 2
        second.free_kv_tokens += 1
        first.faults[2] = aborts(UNAVAILABLE)
        async with streaming(first, second, third, top()) as stream:
            second.draining = True
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays) == (1, {"unavailable": 1})
            assert len(third.requests) == 1

    async def test_session_that_a_drain_cuts_is_a_replay(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.faults[3] = aborts(UNAVAILABLE)
        async with streaming(first, second, top()) as stream:
            answer = stream.steps(stream_input())
            async with answer as steps:
                found = [await anext(aiter(steps))]
                first.draining = True
                found += [step async for step in steps]
            assert ids(found) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays) == (0, {"unavailable": 1})

    async def test_without_another_chain_the_client_gets_unavailable(self) -> None:
        [bottom] = bottoms(1)
        async with streaming(bottom, top(), wait_seconds=0.0) as stream:
            bottom.draining = True
            with pytest.raises(Unavailable, match="after 0 tokens: bottom-0 is shutting down"):
                await stream.all()
            with pytest.raises(Unavailable, match="no chain of route strong"):
                await stream.all()
            assert len(bottom.requests) == 1
