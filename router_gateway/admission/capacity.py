"""What the shards that accept requests could hold together, as the registry knows them now."""

from __future__ import annotations

from dataclasses import dataclass

from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import Replica


@dataclass(frozen=True, slots=True)
class Capacity:
    # First shards that accept requests of one route, at least 1.
    first_shards: int
    # The KV tokens of the smallest stage, all its replicas together; 0: not known yet.
    kv_tokens: int


def capacity_of(registry: ShardRegistry) -> Capacity:
    """The capacity now."""
    stages = [stage for route in registry.stages.values() for stage in route]
    held = [sum(_kv_tokens(replica) for replica in stage if replica.accepts_requests) for stage in stages]
    return Capacity(max(1, registry.count_first_shards()), min(held))


def _kv_tokens(replica: Replica) -> int:
    return 0 if replica.identity is None else replica.identity.kv_capacity_tokens
