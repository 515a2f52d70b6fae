"""All shards of a cluster as replicas, polled at a fixed interval, and a version that counts their changes.

In: the clusters that membership wants, one after the other. Out: the replicas of every stage. Nothing else in the
gateway keeps shards: placement, retries and capacity read the registry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager, suppress

import grpc

from router_gateway.metrics import Metrics
from router_gateway.shards.compatibility import CompatibilityCheck, Voter
from router_gateway.shards.ejection import Ejection, EjectionPolicy
from router_gateway.shards.replica import HealthPolicy, Replica
from stitch.cluster import ClusterConfig, ShardConfig
from stitch.process import log_failure

# Opens a channel to a shard, whose certificate has that name, at that address.
Connect = Callable[[str, str], grpc.aio.Channel]
# For calls that are no sessions on a channel that is not needed any more.
LAST_CALLS_SECONDS = 60.0


class ShardRegistry:
    """A replica for every shard that the cluster wants, by name; `take` changes them.

    A replica that is not wanted any more gets no sessions, and is polled until its own have ended.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        connect: Connect,
        health: HealthPolicy,
        ejection: EjectionPolicy,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._health = health
        self._ejection = ejection
        self._metrics = metrics
        self.clock = clock
        self.replicas: dict[str, Replica] = {}
        # Not wanted any more, and not idle yet.
        self.leaving: set[Replica] = set()
        # The replicas of every stage of a route, by its name.
        self.stages: dict[str, list[list[Replica]]] = {}
        self.compatibility = CompatibilityCheck(cluster)
        self.version = 0
        self._changed = asyncio.Event()
        # Of the replicas that are polled.
        self._tasks: dict[Replica, asyncio.Task[None]] = {}
        self._is_polling = False
        self.take(cluster)

    @property
    def all_replicas(self) -> list[Replica]:
        """The replicas that are wanted, and those that finish their sessions."""
        return [*self.replicas.values(), *self.leaving]

    @property
    def first_shards(self) -> list[Replica]:
        """The replicas on which routes begin, those of the bottom before those of the top; all have the tokenizer."""
        stages = [stages[0] for stages in self.stages.values()]
        stages.sort(key=lambda stage: any(one.config.role == "top" for one in stage))
        return list(dict.fromkeys(replica for stage in stages for replica in stage))

    def count_first_shards(self) -> int:
        """How many shards take new prompts of one route: of routes that begin on other stages the larger number."""
        counts = (sum(one.accepts_requests for one in stages[0]) for stages in self.stages.values())
        return max(counts, default=0)

    def take(self, cluster: ClusterConfig) -> None:
        """These shards are wanted now. One with another address or other layers takes the place of its namesake."""
        wanted = {shard.name: shard for shard in cluster.members}
        for name, replica in list(self.replicas.items()):
            if wanted.get(name) != replica.config:
                self.leaving.add(self.replicas.pop(name))
                replica.wanted = False
        for name, shard in wanted.items():
            if name not in self.replicas:
                self.replicas[name] = self._new_replica(shard)
        self.stages = {
            route.name: [[self.replicas[shard.name] for shard in stage] for stage in cluster.stages(route)]
            for route in cluster.routes
        }
        self.compatibility.cluster = cluster
        if self._is_polling:
            self._start_polling()
        self.report_change()

    @asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Polls every shard within the block, independently of the others, and closes the channels at its end."""
        self._is_polling = True
        self._start_polling()
        try:
            yield
        finally:
            self._is_polling = False
            await self.close()

    async def refresh(self, replicas: Iterable[Replica] | None = None, within_seconds: float | None = None) -> None:
        """Polls these replicas now, None: all that are wanted, and waits for their answers, at most for that time."""
        chosen = self.replicas.values() if replicas is None else replicas
        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                await asyncio.gather(*(replica.poll() for replica in chosen))

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
        """Ends all polls, and closes the channels."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self.all_replicas))

    def _new_replica(self, shard: ShardConfig) -> Replica:
        record = Ejection(shard.name, self._ejection, self.clock, self._ejection_changed)
        channel = self._connect(shard.certified_name, shard.address)
        return Replica(shard, channel, self._health, record, self.clock, self.report_change, self.take_suspects)

    def _start_polling(self) -> None:
        for replica in self.replicas.values():
            if replica not in self._tasks:
                self._tasks[replica] = task = asyncio.create_task(self._attend(replica))
                task.add_done_callback(log_failure)

    async def _attend(self, replica: Replica) -> None:
        """Polls a replica until it is idle and not wanted any more, and closes its channel."""
        while replica.wanted or replica.load.placed().sessions:
            next_at = self.clock() + self._health.poll_seconds
            await replica.poll()
            await asyncio.sleep(max(0.0, next_at - self.clock()))
        await replica.close(LAST_CALLS_SECONDS)
        self.leaving.discard(replica)
        del self._tasks[replica]

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
