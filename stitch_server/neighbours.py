"""The shards that follow this one and those that precede it, as its cluster has them now.

In: names that a caller says. Out: the address of a name, or a refusal. Invariant: a shard connects to addresses of its
own membership alone, never to anything that a caller says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stitch.cluster import SHARD_NAME, ShardConfig
from stitch.errors import Incompatible, InvalidRequest, Unavailable, plain
from stitch.membership import Membership
from stitch.v1 import shard_pb2

# Characters of a name that a refusal repeats.
MAX_SHOWN = 80


class Neighbours:
    """What one shard knows of the others."""

    def __init__(self, membership: Membership, own: ShardConfig) -> None:
        self._membership = membership
        self._own = own

    async def meet(self, names: Iterable[str]) -> None:
        """Reads the cluster's source again where it has not had one of these names: the caller may know it earlier."""
        known = {shard.name for shard in self._members}
        if any(name not in known and SHARD_NAME.fullmatch(name) for name in names):
            await self._membership.refresh()

    @property
    def _members(self) -> list[ShardConfig]:
        """The shards of the cluster, and those that it has just lost: a gateway may place sessions there still."""
        return [*self._membership.cluster.members, *self._membership.just_removed]

    def address_of(self, name: str) -> str:
        """The address of a shard now. Raises Unavailable where the cluster has none of that name."""
        for shard in self._members:
            if shard.name == name:
                return shard.address
        raise Unavailable(f"shard {name} is not in the cluster", shard=name)

    def certified_name(self, name: str) -> str:
        """The name in the certificate of the shard `name`."""
        found = (shard.certified_name for shard in self._members if shard.name == name)
        return next(found, name)

    def has_replica(self, name: str) -> bool:
        """Whether another shard holds the same layers."""
        members = self._membership.cluster.members
        held = [shard.stage for shard in members if shard.name == name]
        return sum(shard.stage in held for shard in members) > 1

    def check_chain(self, route: str, chain: Sequence[str], field: str = "chain") -> None:
        """Raises InvalidRequest unless `chain` names one shard for every stage of the route after this shard.

        Raises Unavailable for the name of a shard that the cluster does not have, or not yet.
        """
        stages, known = self._stages_after(route), [shard.name for shard in self._members]
        for name in chain:
            if name not in known and SHARD_NAME.fullmatch(name):
                raise Unavailable(f"shard {name} is not in the cluster of {self._own.name}", shard=name)
            if name not in known:
                raise InvalidRequest(field, name, f"the cluster has: {', '.join(known)}")
        if len(chain) != len(stages) or any(name not in stage for name, stage in zip(chain, stages, strict=True)):
            expected = ", then ".join(" or ".join(stage) for stage in stages) or "no shard"
            raise InvalidRequest(field, list(chain), f"after {self._own.name} route {route} passes {expected}")

    def check_first(self, route: str) -> None:
        """Raises InvalidRequest unless the route begins on this shard."""
        cluster = self._membership.cluster
        first = cluster.stage_layers(cluster.route(route))[0]
        if self._own.stage != first:
            names = " or ".join(shard.name for shard in self._members if shard.stage == first)
            raise InvalidRequest("route", route, f"it begins on {names}, not on {self._own.name}")

    def check_upstream(self, caller: shard_pb2.ShardIdentity) -> None:
        """Raises Incompatible unless the caller is a shard of the cluster with the layers that it has there."""
        stated = caller.shard, (caller.role, (caller.first_layer, caller.end_layer))
        if stated not in [(one.name, one.stage) for one in self._membership.cluster.members]:
            held = f"{plain(caller.role, MAX_SHOWN)} layers {caller.first_layer} to {caller.end_layer}"
            name = plain(caller.shard, MAX_SHOWN)
            raise Incompatible(f"shard {name} with {held} is not in the cluster of {self._own.name}")

    def _stages_after(self, route: str) -> list[list[str]]:
        """The names of the replicas of every stage after this shard's."""
        cluster = self._membership.cluster
        stages = cluster.stage_layers(cluster.route(route))
        if self._own.stage not in stages:
            raise InvalidRequest("route", route, f"it does not pass {self._own.name}")
        following = stages[stages.index(self._own.stage) + 1 :]
        return [[shard.name for shard in self._members if shard.stage == stage] for stage in following]
