"""The shards that follow this one, as its cluster file has them.

In: names that a caller says. Out: the address of a name, or a refusal. Invariant: a shard connects to addresses of its
own cluster file alone, never to anything that a caller says.
"""

from __future__ import annotations

from collections.abc import Sequence

from stitch.cluster import ClusterConfig
from stitch.errors import Incompatible, InvalidRequest, Unavailable, plain
from stitch.v1 import shard_pb2

# Characters of a name that a refusal repeats.
MAX_SHOWN = 80


class Neighbours:
    """What one shard knows of the others."""

    def __init__(self, cluster: ClusterConfig, own: str) -> None:
        """`own` is the name of this shard."""
        self._cluster = cluster
        self._own = own

    def address_of(self, name: str) -> str:
        """The address of a shard now. Raises Unavailable where the cluster has none of that name."""
        for shard in self._cluster.shards:
            if shard.name == name:
                return shard.address
        raise Unavailable(f"shard {name} is not in the cluster", shard=name)

    def has_replica(self, name: str) -> bool:
        """Whether another shard holds the same layers."""
        held = [(shard.role, shard.layers) for shard in self._cluster.shards if shard.name == name]
        return sum((shard.role, shard.layers) in held for shard in self._cluster.shards) > 1

    def check_chain(self, route: str, chain: Sequence[str], field: str = "chain") -> None:
        """Raises InvalidRequest unless `chain` names one shard for every stage of the route after this shard."""
        stages, known = self._stages_after(route), [shard.name for shard in self._cluster.shards]
        for name in chain:
            if name not in known:
                raise InvalidRequest(field, name, f"the cluster has: {', '.join(known)}")
        if len(chain) != len(stages) or any(name not in stage for name, stage in zip(chain, stages, strict=True)):
            expected = ", then ".join(" or ".join(stage) for stage in stages) or "no shard"
            raise InvalidRequest(field, list(chain), f"after {self._own} route {route} passes {expected}")

    def check_upstream(self, caller: shard_pb2.ShardIdentity) -> None:
        """Raises Incompatible unless the caller is a shard of the cluster with the layers that it has there."""
        stated = caller.shard, caller.role, caller.first_layer, caller.end_layer
        if stated not in [(one.name, one.role, *one.layers) for one in self._cluster.shards]:
            name, role, first, end = stated
            held = f"{plain(role, MAX_SHOWN)} layers {first} to {end}"
            raise Incompatible(f"shard {plain(name, MAX_SHOWN)} with {held} is not in the cluster of {self._own}")

    def _stages_after(self, route: str) -> list[list[str]]:
        """The names of the replicas of every stage after this shard's."""
        stages = [[shard.name for shard in stage] for stage in self._cluster.stages(self._cluster.route(route))]
        own = [index for index, stage in enumerate(stages) if self._own in stage]
        if not own:
            raise InvalidRequest("route", route, f"it does not pass {self._own}")
        return stages[own[0] + 1 :]
