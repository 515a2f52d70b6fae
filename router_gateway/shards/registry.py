"""All shards of a cluster as replicas, polled at a fixed interval, and a version that counts their changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from router_gateway.shards.replica import CompatibilityCheck, HealthPolicy, Replica
from stitch.cluster import ClusterConfig
from stitch.process import background_tasks

Connect = Callable[[str], grpc.aio.Channel]


class ShardRegistry:
    """A replica for every shard of the cluster file, by name."""

    def __init__(self, cluster: ClusterConfig, connect: Connect, policy: HealthPolicy) -> None:
        self._channels = [connect(shard.address) for shard in cluster.shards]
        self._poll_seconds = policy.poll_seconds
        check = CompatibilityCheck()
        self.replicas = {
            shard.name: Replica(shard, channel, check, self._change, policy)
            for shard, channel in zip(cluster.shards, self._channels, strict=True)
        }
        self.version = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Polls every shard within the block, independently of the others, and closes the channels at its end."""

        async def poll_forever(replica: Replica) -> None:
            while True:
                await replica.poll()
                await asyncio.sleep(self._poll_seconds)

        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.close)
            await stack.enter_async_context(background_tasks(*map(poll_forever, self.replicas.values())))
            yield

    async def refresh(self, names: Iterable[str] | None = None) -> None:
        """Polls these shards now; None: all of them."""
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
        # Wakes the present waiters; later ones wait for the next change.
        self._changed.set()
        self._changed = asyncio.Event()
