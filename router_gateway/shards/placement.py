"""Which replicas make the chain for a request. Knows no tokens, only how many there are."""

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
        return tuple(replica.place.name for replica in self.replicas)

    @property
    def rest(self) -> list[str]:
        """Addresses of the shards after the first."""
        return [replica.place.address for replica in self.replicas[1:]]

    @property
    def serving(self) -> bool:
        return all(replica.serving for replica in self.replicas)

    def reserve(self, tokens: int) -> None:
        """Counts tokens as taken on every shard until it says by itself what is free."""
        for replica in self.replicas:
            replica.reserve(tokens)

    @contextmanager
    def on_unavailable(self, tell: Callable[[], object]) -> Iterator[None]:
        """Calls `tell` if any of the shards goes away inside of the block."""
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica.on_unavailable(tell))
            yield


@dataclass(frozen=True, slots=True)
class CandidateChains(Chain):
    """The chains of several routes, of which their common first shard takes one; `replicas` are those of all.

    If any of them goes away, all is begun anew: what the first shard takes is known a moment later.
    """

    # By route.
    branches: Mapping[str, Chain]


class Placement:
    """Finds chains of shards that serve now."""

    def __init__(self, cluster: ClusterConfig, fleet: ShardRegistry) -> None:
        self._stages = {
            route.name: [[fleet.replicas[place.name] for place in stage] for stage in cluster.stages(route)]
            for route in cluster.routes
        }

    def choose(self, route: str, failures: Counter[str]) -> Chain | None:
        """The chain of shards with the fewest `failures`, of those with the most free KV.

        None where a stage has no shard that serves.
        """
        chosen = []
        for stage in self._stages[route]:
            serving = [replica for replica in stage if replica.serving]
            if not serving:
                return None
            chosen.append(min(serving, key=lambda one: (failures[one.place.name], -one.free_kv_tokens)))
        return Chain(tuple(chosen))

    def fork(self, routes: Sequence[str], failures: Counter[str]) -> CandidateChains | None:
        """A chain as `choose` finds it for each route; None where one of them has none.

        All have one first shard: the first stage is the same for every route, and so is the choice.
        """
        chains = {route: self.choose(route, failures) for route in routes}
        found = {route: chain for route, chain in chains.items() if chain is not None}
        if len(found) < len(chains):
            return None
        replicas = {replica.place.name: replica for chain in found.values() for replica in chain.replicas}
        return CandidateChains(tuple(replicas.values()), found)

    def reachable(self, route: RouteConfig) -> bool:
        """Whether every stage of the route has a shard that serves."""
        return all(any(replica.serving for replica in stage) for stage in self._stages[route.name])

    def shards(self, route: str) -> list[str]:
        """Names of all shards that may take part in the route."""
        return [replica.place.name for stage in self._stages[route] for replica in stage]
