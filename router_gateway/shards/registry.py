"""All shards of a cluster as replicas, polled at a fixed interval, and a version that counts their changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import grpc

from router_gateway.metrics import Metrics
from router_gateway.shards.compatibility import CompatibilityCheck, Voter
from router_gateway.shards.ejection import Ejection, EjectionPolicy
from router_gateway.shards.replica import HealthPolicy, Replica
from stitch.cluster import ClusterConfig, ShardConfig
from stitch.process import background_tasks

# Opens a channel to the shard of that name, at that address.
Connect = Callable[[str, str], grpc.aio.Channel]


class ShardRegistry:
    """A replica for every shard of the cluster file, by name."""

    def __init__(
        self,
        cluster: ClusterConfig,
        connect: Connect,
        health: HealthPolicy,
        ejection: EjectionPolicy,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channels = [connect(shard.name, shard.address) for shard in cluster.shards]
        self._poll_seconds = health.poll_seconds
        self._metrics = metrics
        self.clock = clock

        def replica(shard: ShardConfig, channel: grpc.aio.Channel) -> Replica:
            record = Ejection(shard.name, ejection, clock, self._ejection_changed)
            return Replica(shard, channel, health, record, clock, self.report_change, self.take_suspects)

        self.replicas = {
            shard.name: replica(shard, channel) for shard, channel in zip(cluster.shards, self._channels, strict=True)
        }
        self.compatibility = CompatibilityCheck(cluster)
        self.version = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Polls every shard within the block, independently of the others, and closes the channels at its end."""

        async def poll_forever(replica: Replica) -> None:
            while True:
                next_at = self.clock() + self._poll_seconds
                await replica.poll()
                await asyncio.sleep(max(0.0, next_at - self.clock()))

        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.close)
            await stack.enter_async_context(background_tasks(*map(poll_forever, self.replicas.values())))
            yield

    async def refresh(self, names: Iterable[str] | None = None, within_seconds: float | None = None) -> None:
        """Polls these shards now, None: all of them, and waits for their answers, at most for that time."""
        chosen = self.replicas if names is None else names
        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                await asyncio.gather(*(self.replicas[name].poll() for name in chosen))

    async def changed_since(self, version: int, within_seconds: float | None = None) -> None:
        """Returns once `version` is no longer the latest, at most after that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                while self.version == version:
                    await self._changed.wait()

    def take_suspects(self, shard: str, suspects: Collection[str]) -> None:
        """`shard` waits in vain for replies of these shards, and of no others: they are avoided until it says so."""
        for name, replica in self.replicas.items():
            if name not in suspects:
                replica.suspected_by.discard(shard)
            elif shard not in replica.suspected_by:
                replica.suspected_by.add(shard)
                replica.ejection.eject("suspected", f"shard {shard} waits for its replies")

    def report_change(self) -> None:
        """Something that placement depends on has changed: wakes all who wait for that."""
        self._compare()
        self.version += 1
        # Wakes the present waiters; later ones wait for the next change.
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self.replicas.values()))
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    def _ejection_changed(self, cause: str | None) -> None:
        if cause is not None:
            self._metrics.ejections.labels(cause=cause).inc()
        self.report_change()

    def _compare(self) -> None:
        """Finds out which replicas differ from the cluster file or from the others: they get no sessions."""
        misplaced = {name: _misplaced(replica) for name, replica in self.replicas.items()}
        facts = {
            name: self.compatibility.facts_of(replica.identity)
            for name, replica in self.replicas.items()
            if replica.identity is not None
        }
        self.compatibility.update(
            [
                Voter(name, facts[name], not replica.draining, replica.ejection.avoided)
                for name, replica in self.replicas.items()
                if replica.serving and misplaced[name] is None
            ]
        )
        for name, stated in facts.items():
            self.replicas[name].take_mismatch(misplaced[name] or self.compatibility.mismatch(stated))


def _misplaced(replica: Replica) -> str | None:
    """Why it would compute other layers than the cluster file says; None where it would not."""
    identity, config = replica.identity, replica.config
    if identity is None:
        return None
    held = (identity.role, identity.first_layer, identity.end_layer)
    if held == (config.role, *config.layers):
        return None
    stated = (*config.layers, config.role)
    return "it holds {} layers {} to {}, but the cluster file says {} to {} of {}".format(*held, *stated)
