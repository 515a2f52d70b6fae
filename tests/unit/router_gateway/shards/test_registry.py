"""Tests of the registry: every change wakes its waiters, and polling finds changes."""

from __future__ import annotations

import asyncio

import grpc

from router_gateway.metrics import Metrics
from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import HealthPolicy
from stitch import channels
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
        await registry.refresh(["top-0"])
        assert [replica.serving for replica in registry.replicas.values()] == [False, True]


async def test_polling_finds_a_shard_that_goes_and_returns() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fake_cluster(shard, FakeShard("top-0", "top")) as cluster:
        policy = HealthPolicy(poll_seconds=0.01, poll_timeout_seconds=0.2, confirm_seconds=0.1, max_failed_polls=1)
        registry = ShardRegistry(cluster, channels.open_plain_channel, policy, EjectionPolicy(), Metrics([], []))
        replica = registry.replicas["bottom-0"]
        async with registry.polling():
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
