"""What the shards that accept requests could hold together, as the registry knows them now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import Replica
from stitch.cluster import ClusterConfig


@dataclass(frozen=True, slots=True)
class Capacity:
    # First shards that accept requests, at least 1.
    first_shards: int
    # The KV tokens of the smallest stage, all its replicas together; 0: not known yet.
    kv_tokens: int


def capacity_of(cluster: ClusterConfig, registry: ShardRegistry) -> Callable[[], Capacity]:
    """A function for the capacity now."""
    stages = {tuple(shard.name for shard in stage) for route in cluster.routes for stage in cluster.stages(route)}
    first = {shard.name for route in cluster.routes for shard in cluster.stages(route)[0]}

    def current() -> Capacity:
        accepting = {name: one for name, one in registry.replicas.items() if one.accepts_requests}
        held = [sum(_kv_tokens(accepting[name]) for name in stage if name in accepting) for stage in stages]
        return Capacity(max(1, len(first & accepting.keys())), min(held))

    return current


def _kv_tokens(replica: Replica) -> int:
    return 0 if replica.identity is None else replica.identity.kv_capacity_tokens
