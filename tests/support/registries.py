"""Shard registries over fake shards, which a test polls by `refresh`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from router_gateway.metrics import Metrics
from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import HealthPolicy
from stitch import channels
from stitch.cluster import ClusterConfig
from tests.support.fake_shard import FakeShard, fake_cluster

QUICK = HealthPolicy(
    poll_timeout_seconds=0.2,
    doubt_seconds=0.1,
    confirm_seconds=0.1,
    check_seconds=0.01,
    overdue_seconds=0.05,
    max_failed_polls=1,
)


@asynccontextmanager
async def registry_of(
    *shards: FakeShard,
    max_failed_polls: int = 1,
    metrics: Metrics | None = None,
    clock: Callable[[], float] = time.monotonic,
    **ejection: Any,
) -> AsyncIterator[tuple[ClusterConfig, ShardRegistry]]:
    """A cluster of these shards, and a registry that has no state of them until a test calls `refresh`.

    `ejection` is passed to `EjectionPolicy`.
    """
    health = QUICK.model_copy(update={"max_failed_polls": max_failed_polls})
    counted = metrics or Metrics(["weak", "strong"], ["requested"])
    async with fake_cluster(*shards) as cluster:
        registry = ShardRegistry(
            cluster, channels.open_plain_channel, health, EjectionPolicy(**ejection), counted, clock
        )
        try:
            yield cluster, registry
        finally:
            await registry.close()
