"""Which chain an answer goes on with after one was lost, and when to give up. Knows no tokens but their number.

A chain that has not failed is taken at once. One that has, or one that is not there yet, gets a pause that doubles.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client import Counter as CounterMetric

from router_gateway.requests.attempt import ChainLost
from router_gateway.shards.placement import Chain, Placement
from router_gateway.shards.registry import ShardRegistry
from stitch.errors import Exhausted, StitchError, Unavailable


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long an answer is resumed before it is given up; every new token makes the counts begin anew."""

    wait_seconds: float
    # Before a chain that failed is tried again.
    first_pause_seconds: float
    # A session that kills its shard must not kill every shard.
    most_losses: int


@dataclass(frozen=True, slots=True)
class FailoverDependencies:
    """What every answer of a gateway shares."""

    fleet: ShardRegistry
    placement: Placement
    replays: CounterMetric
    persistence: RetryPolicy
    # Seconds that only ever grow.
    clock: Callable[[], float]


@dataclass(slots=True)
class FailureRecord:
    """What went wrong since the last token."""

    count: int = 0
    # By the name of a shard.
    by_shard: Counter[str] = field(default_factory=Counter)
    chains: set[tuple[str, ...]] = field(default_factory=set)
    since: float | None = None
    last: Exception | None = None


class Failover:
    """The chains of one answer, one after the other."""

    def __init__(self, routes: tuple[str, ...], around: FailoverDependencies) -> None:
        # Those between which a first shard is to decide, or the one that it took.
        self.routes = routes
        self._around = around
        self._losses = FailureRecord()

    def settle(self, route: str) -> None:
        """The answer takes this route from now on, whatever is lost."""
        self.routes = (route,)

    def progressed(self) -> None:
        """A token came: what happened before is forgotten."""
        if self._losses.count:
            self._losses = FailureRecord()

    async def lost(self, chain: Chain, error: ChainLost | Exhausted, generated_tokens: int) -> None:
        """Notes that the chain failed. Raises Unavailable where too many did."""
        losses = self._losses
        losses.count += 1
        losses.by_shard.update(chain.names)
        losses.chains.add(chain.names)
        losses.since = self._around.clock() if losses.since is None else losses.since
        losses.last = error
        if losses.count > self._around.persistence.most_losses:
            raise self._given_up(generated_tokens)
        # Which shard of the chain is gone, they say themselves.
        await self._around.fleet.refresh(one.place.name for one in chain.replicas if one.serving)

    async def next_chain(self, tokens: int, generated_tokens: int) -> Chain:
        """The chain to try now, with room counted for `tokens`. Raises Unavailable or Exhausted where none is."""
        paused = False
        while (chain := self._choice(even_failed=paused)) is None:
            await self._pause(generated_tokens)
            paused = True
        chain.reserve(tokens)
        if isinstance(self._losses.last, ChainLost):
            self._around.replays.labels(cause=self._losses.last.cause).inc()
        return chain

    def _choice(self, even_failed: bool) -> Chain | None:
        placement, failures = self._around.placement, self._losses.by_shard
        decided = len(self.routes) == 1
        chain = placement.choose(self.routes[0], failures) if decided else placement.fork(self.routes, failures)
        failed = chain is not None and chain.names in self._losses.chains
        return None if failed and not even_failed else chain

    async def _pause(self, generated_tokens: int) -> None:
        fleet, persistence = self._around.fleet, self._around.persistence
        version = fleet.version
        await fleet.refresh({name for route in self.routes for name in self._around.placement.shards(route)})
        if fleet.version != version:
            return
        patience = self._patience_seconds()
        if patience <= 0:
            raise self._given_up(generated_tokens)
        pause = persistence.first_pause_seconds * 2.0**self._losses.count
        with suppress(TimeoutError):
            await asyncio.wait_for(fleet.changed_since(version), min(pause, patience))

    def _patience_seconds(self) -> float:
        """What is left for waiting; nothing for an answer that no chain has begun."""
        if self._losses.since is None:
            return 0.0
        return self._losses.since + self._around.persistence.wait_seconds - self._around.clock()

    def _given_up(self, generated_tokens: int) -> StitchError:
        if isinstance(self._losses.last, Exhausted):
            return self._losses.last
        why = f": {self._losses.last}" if self._losses.last else ""
        message = f"no chain of route {' or '.join(self.routes)} can go on after {generated_tokens:,} tokens{why}"
        return Unavailable(message, generated_tokens)
