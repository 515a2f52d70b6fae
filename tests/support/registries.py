"""Shard registries over fake shards, which a test polls by `refresh`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import HealthPolicy
from stitch import channels
from stitch.cluster import ClusterConfig
from tests.support.fake_shard import FakeShard, fake_cluster


@asynccontextmanager
async def registry_of(*shards: FakeShard, max_timeouts: int = 1) -> AsyncIterator[tuple[ClusterConfig, ShardRegistry]]:
    """A cluster of these shards, and a registry that has no state of them until a test calls `refresh`."""
    async with fake_cluster(*shards) as cluster:
        registry = ShardRegistry(
            cluster, channels.open_channel, HealthPolicy(poll_timeout_seconds=0.2, max_timeouts=max_timeouts)
        )
        try:
            yield cluster, registry
        finally:
            await registry.close()
