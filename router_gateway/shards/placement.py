"""Chooses the chain of replicas for a request: for every stage of its route the one with the most free KV.

Only replicas that accept requests are chosen. Within one request, replicas that failed it come last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import Replica
from stitch.cluster import ClusterConfig, RouteConfig


@dataclass(frozen=True, slots=True)
class Chain:
    """One replica for every stage of a route, first to last."""

    replicas: tuple[Replica, ...]

    @property
    def first(self) -> Replica:
        return self.replicas[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(replica.config.name for replica in self.replicas)

    @property
    def next_names(self) -> tuple[str, ...]:
        """Names of the shards after the first."""
        return self.names[1:]

    @property
    def serving(self) -> bool:
        """Whether sessions that run on it continue."""
        return all(replica.serving for replica in self.replicas)

    @property
    def draining(self) -> bool:
        """Whether one of its shards refuses new sessions."""
        return any(replica.draining for replica in self.replicas)

    def reserve(self, tokens: int) -> None:
        """Counts KV tokens as used on every shard until its next poll."""
        for replica in self.replicas:
            replica.reserve(tokens)

    @contextmanager
    def on_unavailable(self, callback: Callable[[], object]) -> Iterator[None]:
        """Calls `callback` if any of the shards is gone within the block."""
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica.on_unavailable(callback))
            yield


@dataclass(frozen=True, slots=True)
class CandidateChains(Chain):
    """The chains of several routes, between which their common first shard decides; `replicas` are those of all.

    If any of them is gone, the session starts over on other chains: the first shard's decision takes only a moment.
    """

    by_route: Mapping[str, Chain]


class Placement:
    """Chooses among the replicas of a registry."""

    def __init__(self, cluster: ClusterConfig, registry: ShardRegistry) -> None:
        self._stages = {
            route.name: [[registry.replicas[shard.name] for shard in stage] for stage in cluster.stages(route)]
            for route in cluster.routes
        }

    def choose(self, route: str, failures: Counter[str]) -> Chain | None:
        """The chain of the replicas with the fewest `failures`, and of those with the most free KV.

        None where a stage has no replica that accepts requests.
        """
        chosen = []
        for stage in self._stages[route]:
            candidates = [replica for replica in stage if replica.accepts_requests]
            if not candidates:
                return None
            chosen.append(min(candidates, key=lambda one: (failures[one.config.name], -one.free_kv_tokens)))
        return Chain(tuple(chosen))

    def choose_candidates(self, routes: Sequence[str], failures: Counter[str]) -> CandidateChains | None:
        """A chain as `choose` finds it for each route; None where one of them has none.

        All have the same first shard, since all routes have the same first stage.
        """
        chains = {route: self.choose(route, failures) for route in routes}
        found = {route: chain for route, chain in chains.items() if chain is not None}
        if len(found) < len(chains):
            return None
        replicas = {replica.config.name: replica for chain in found.values() for replica in chain.replicas}
        return CandidateChains(tuple(replicas.values()), found)

    def reachable(self, route: RouteConfig) -> bool:
        """Whether every stage of the route has a replica that accepts requests."""
        return all(any(replica.accepts_requests for replica in stage) for stage in self._stages[route.name])

    def shards(self, route: str) -> list[str]:
        """Names of all shards of the route's stages, replicas included."""
        return [replica.config.name for stage in self._stages[route] for replica in stage]
