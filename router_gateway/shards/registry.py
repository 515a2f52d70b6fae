"""All shards of the cluster and what changed among them. Knows no route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from router_gateway.background import running
from router_gateway.shards.compatibility import CompatibilityCheck
from router_gateway.shards.replica import HealthPolicy, Replica
from stitch.cluster import ClusterConfig

Connect = Callable[[str], grpc.aio.Channel]


class ShardRegistry:
    """A replica for every shard of the cluster file, and a version that counts their changes."""

    def __init__(self, cluster: ClusterConfig, connect: Connect, patience: HealthPolicy) -> None:
        self._channels = [connect(shard.address) for shard in cluster.shards]
        agreement = CompatibilityCheck()
        self.replicas = {
            shard.name: Replica(shard, channel, agreement, self._change, patience)
            for shard, channel in zip(cluster.shards, self._channels, strict=True)
        }
        self.version = 0
        self._changed = asyncio.Event()

    async def refresh(self, names: Iterable[str] | None = None) -> None:
        """Polls these shards now, or all of them."""
        chosen = self.replicas if names is None else names
        await asyncio.gather(*(self.replicas[name].poll() for name in chosen))

    async def changed_since(self, version: int) -> None:
        """Returns once `version` is no longer the latest."""
        while self.version == version:
            await self._changed.wait()

    async def close(self) -> None:
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    def _change(self) -> None:
        self.version += 1
        # Those who wait now are woken; those who come later wait for the next change.
        self._changed.set()
        self._changed = asyncio.Event()


@asynccontextmanager
async def watched(fleet: ShardRegistry, poll_seconds: float) -> AsyncIterator[ShardRegistry]:
    """Polls every shard again and again, each at its own pace, and closes the connections at the end."""

    async def watch(replica: Replica) -> None:
        while True:
            await replica.poll()
            await asyncio.sleep(poll_seconds)

    async with AsyncExitStack() as stack:
        stack.push_async_callback(fleet.close)
        await stack.enter_async_context(running(*map(watch, fleet.replicas.values())))
        yield fleet
