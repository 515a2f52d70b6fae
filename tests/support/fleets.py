"""Fleets that are polled by hand, in front of fake shards. Knows no gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import HealthPolicy
from stitch import channels
from stitch.cluster import ClusterConfig
from tests.support.fake_shard import FakeShard, fake_cluster


@asynccontextmanager
async def fleet_of(*shards: FakeShard, silent_polls: int = 1) -> AsyncIterator[tuple[ClusterConfig, ShardRegistry]]:
    """A cluster of these shards, and a fleet that knows nothing of them until a test calls `refresh`."""
    async with fake_cluster(*shards) as cluster:
        fleet = ShardRegistry(
            cluster, channels.open_channel, HealthPolicy(answer_seconds=0.2, silent_polls=silent_polls)
        )
        try:
            yield cluster, fleet
        finally:
            await fleet.close()
