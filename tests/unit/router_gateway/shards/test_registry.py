"""Tests of the registry: every change wakes its waiters, and polling finds changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from router_gateway.metrics import Metrics
from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.placement import Chain, Placement
from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import HealthPolicy
from stitch import channels
from stitch.cluster import ClusterConfig
from tests.support.fake_shard import FakeShard, fake_cluster
from tests.support.registries import registry_of
from tests.support.waiting import eventually


async def test_poll_without_change_keeps_the_version() -> None:
    async with registry_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        await registry.refresh()
        version = registry.version
        await registry.refresh()
        assert registry.version == version


async def test_waiters_wake_with_the_next_change() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        await registry.refresh()
        waiters = [asyncio.create_task(registry.changed_since(registry.version)) for _ in range(2)]
        await shard.stop()
        await registry.refresh()
        await asyncio.gather(*waiters)
        assert not registry.replicas["bottom-0"].serving


async def test_wait_for_an_old_version_returns_at_once() -> None:
    async with registry_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        version = registry.version
        await registry.refresh()
        await registry.changed_since(version)


async def test_refresh_polls_only_the_named_shards() -> None:
    async with registry_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        await registry.refresh([registry.replicas["top-0"]])
        assert [replica.serving for replica in registry.replicas.values()] == [False, True]


@asynccontextmanager
async def polled(cluster: ClusterConfig) -> AsyncIterator[ShardRegistry]:
    """A registry that polls the cluster's shards all the time."""
    policy = HealthPolicy(poll_seconds=0.01, poll_timeout_seconds=0.2, confirm_seconds=0.1, max_failed_polls=1)
    registry = ShardRegistry(cluster, channels.open_plain_channel, policy, EjectionPolicy(), Metrics([], []))
    async with registry.polling():
        yield registry


async def test_polling_finds_a_shard_that_goes_and_returns() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fake_cluster(shard, FakeShard("top-0", "top")) as cluster, polled(cluster) as registry:
        replica = registry.replicas["bottom-0"]
        await eventually(lambda: replica.serving)
        await shard.stop()
        await eventually(lambda: not replica.serving)
        await shard.start()
        await eventually(lambda: replica.serving)


async def test_suspect_of_a_shard_is_avoided_while_that_shard_says_so() -> None:
    bottom, tops = FakeShard("bottom-0", "bottom"), [FakeShard("top-0", "top"), FakeShard("top-1", "top")]
    async with registry_of(bottom, *tops, first_seconds=0.01) as (_, registry):
        suspect = registry.replicas["top-0"]
        bottom.suspects = ["top-0", "of no cluster"]
        await registry.refresh()
        assert [replica.avoided for replica in registry.replicas.values()] == [False, True, False]
        await asyncio.sleep(0.02)
        assert suspect.avoided
        bottom.suspects = []
        await registry.refresh()
        assert not suspect.avoided


async def test_suspects_of_a_shard_that_is_gone_are_none() -> None:
    bottom = FakeShard("bottom-0", "bottom")
    bottom.suspects = ["top-0"]
    async with registry_of(bottom, FakeShard("top-0", "top"), first_seconds=0.01) as (_, registry):
        await registry.refresh()
        await bottom.stop()
        await registry.refresh()
        await eventually(lambda: not registry.replicas["top-0"].avoided)


async def test_one_failed_poll_changes_nothing() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top"), max_failed_polls=2) as (_, registry):
        await registry.refresh()
        version = registry.version
        for code in grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED:
            shard.describe_faults = [code]
            await registry.refresh()
            await registry.refresh()
            assert registry.replicas["bottom-0"].accepts_requests
        assert registry.version == version


def with_shards(cluster: ClusterConfig, *shards: FakeShard) -> ClusterConfig:
    return cluster.model_copy(update={"shards": tuple(shard.config for shard in shards)})


async def test_new_replica_accepts_requests_after_its_first_poll() -> None:
    bottom, first, second = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top"), FakeShard("top-1", "top")
    async with fake_cluster(bottom, first, second) as cluster, polled(with_shards(cluster, bottom, first)) as registry:
        version = registry.version
        registry.take(with_shards(cluster, bottom, first, second))
        assert registry.version > version
        replica = registry.replicas["top-1"]
        assert not replica.accepts_requests
        assert registry.stages["weak"][1] == [registry.replicas["top-0"], replica]
        await eventually(lambda: replica.accepts_requests)


async def test_removed_replica_is_polled_until_its_sessions_end() -> None:
    bottom, first, second = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top"), FakeShard("top-1", "top")
    async with fake_cluster(bottom, first, second) as cluster, polled(cluster) as registry:
        placement, removed = Placement(registry), registry.replicas["top-1"]
        await eventually(lambda: removed.accepts_requests)
        with placement.place(Chain((registry.replicas["bottom-0"], removed)), 4, 8):
            registry.take(with_shards(cluster, bottom, first))
            assert not removed.accepts_requests
            assert "top-1" not in registry.replicas
            assert removed in placement.replicas
            polls = second.polls
            await eventually(lambda: second.polls > polls + 1)
        await eventually(lambda: removed not in placement.replicas)


async def test_shard_at_another_address_takes_the_place_of_its_namesake() -> None:
    bottom, first, moved = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top"), FakeShard("top-0", "top")
    async with fake_cluster(bottom, first) as cluster, polled(cluster) as registry:
        before = registry.replicas["top-0"]
        await eventually(lambda: before.accepts_requests)
        await moved.start()
        try:
            registry.take(with_shards(cluster, bottom, moved))
            assert registry.replicas["top-0"] is not before
            await eventually(lambda: registry.replicas["top-0"].accepts_requests)
            assert not before.accepts_requests
        finally:
            await moved.stop()


async def test_shards_that_stay_keep_their_replicas() -> None:
    shards = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top"), FakeShard("top-1", "top")
    async with registry_of(*shards) as (cluster, registry):
        before = dict(registry.replicas)
        registry.take(with_shards(cluster, *shards[:2]))
        assert registry.replicas == {name: before[name] for name in ("bottom-0", "top-0")}
