"""Fleets that are polled by hand, in front of fake shards. Knows no gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router_gateway.shards.registry import Fleet
from router_gateway.shards.replica import Patience
from stitch import channels
from stitch.cluster import Cluster
from tests.support.fake_shard import FakeShard, fake_cluster


@asynccontextmanager
async def fleet_of(*shards: FakeShard, silent_polls: int = 1) -> AsyncIterator[tuple[Cluster, Fleet]]:
    """A cluster of these shards, and a fleet that knows nothing of them until a test calls `refresh`."""
    async with fake_cluster(*shards) as cluster:
        fleet = Fleet(cluster, channels.open_channel, Patience(answer_seconds=0.2, silent_polls=silent_polls))
        try:
            yield cluster, fleet
        finally:
            await fleet.close()
