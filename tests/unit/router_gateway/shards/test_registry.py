"""Changes are seen by those who wait for them, and by nobody twice."""

from __future__ import annotations

import asyncio

from router_gateway.shards.registry import ShardRegistry, watched
from router_gateway.shards.replica import HealthPolicy
from stitch import channels
from tests.support.fake_shard import FakeShard, fake_cluster
from tests.support.fleets import fleet_of
from tests.support.waiting import eventually


async def test_a_poll_without_news_is_no_change() -> None:
    async with fleet_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, fleet):
        await fleet.refresh()
        version = fleet.version
        await fleet.refresh()
        assert fleet.version == version


async def test_whoever_waits_is_woken_by_the_next_change() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fleet_of(shard, FakeShard("top-0", "top")) as (_, fleet):
        await fleet.refresh()
        waiters = [asyncio.create_task(fleet.changed_since(fleet.version)) for _ in range(2)]
        await shard.stop()
        await fleet.refresh()
        await asyncio.gather(*waiters)
        assert not fleet.replicas["bottom-0"].serving


async def test_whoever_missed_a_change_does_not_wait() -> None:
    async with fleet_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, fleet):
        version = fleet.version
        await fleet.refresh()
        await fleet.changed_since(version)


async def test_only_the_named_shards_are_polled() -> None:
    async with fleet_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, fleet):
        await fleet.refresh(["top-0"])
        assert [replica.serving for replica in fleet.replicas.values()] == [False, True]


async def test_a_watched_fleet_sees_a_shard_go_and_come_back() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fake_cluster(shard, FakeShard("top-0", "top")) as cluster:
        fleet = ShardRegistry(cluster, channels.open_channel, HealthPolicy(answer_seconds=0.2, silent_polls=1))
        replica = fleet.replicas["bottom-0"]
        async with watched(fleet, poll_seconds=0.01):
            await eventually(lambda: replica.serving)
            await shard.stop()
            await eventually(lambda: not replica.serving)
            await shard.start()
            await eventually(lambda: replica.serving)
