"""The models and routes that a cluster serves, from its cluster file and from the identities of its shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import Replica
from stitch.cluster import ModelConfig, RouteConfig
from stitch.errors import Unavailable
from stitch.membership import Membership
from stitch.v1 import inference_pb2, shard_pb2


class ModelRegistry:
    """Merges the cluster file with the identities of the shards, which are kept while a shard is gone."""

    def __init__(self, membership: Membership, registry: ShardRegistry) -> None:
        self._membership = membership
        # Models and routes never change.
        self._cluster = membership.cluster
        self._registry = registry

    @property
    def context_tokens(self) -> int:
        """The most tokens of prompt and answer together, by both models' context and by every shard's KV.

        Raises Unavailable before the first shard has answered.
        """
        capacities = [identity.kv_capacity_tokens for identity in self._identities() if identity.kv_capacity_tokens]
        return min(self._stated("context_length") + capacities)

    @property
    def vocabulary_size(self) -> int:
        """Forced tokens are below this: they meet rows of both models, which may be padded differently."""
        return min(self._stated("vocabulary_size"))

    @property
    def prompt_vocabulary_size(self) -> int:
        """Tokens of a prompt are below this: they meet the bottom's embedding, and the top's where routes begin."""
        if not all(route.bottom_layers for route in self._cluster.routes):
            return self.vocabulary_size
        return self._model("bottom", self._cluster.models.bottom).vocabulary_size or self.vocabulary_size

    def routes(self) -> list[str]:
        """Routes by name, cheapest first: by parameters read per token, or by bottom layers until all are known."""
        parameters = {route.name: self._route(route).parameters for route in self._cluster.routes}
        known = all(parameters.values())
        cheapest_first = sorted(
            self._cluster.routes, key=lambda route: (parameters[route.name] if known else 0, route.bottom_layers)
        )
        return [route.name for route in cheapest_first]

    def costs(self) -> dict[str, float]:
        """Parameters read per token by route, relative to the most expensive route; empty until all are known."""
        parameters = {route.name: self._route(route).parameters for route in self._cluster.routes}
        most = max(parameters.values())
        return {name: count / most for name, count in parameters.items()} if all(parameters.values()) else {}

    def describe(self, addresses: bool = False) -> inference_pb2.DescribeResponse:
        return inference_pb2.DescribeResponse(
            cluster=self._cluster.name,
            bottom=self._model("bottom", self._cluster.models.bottom),
            top=self._model("top", self._cluster.models.top),
            routes=[self._route(self._cluster.route(name)) for name in self.routes()],
            shards=[_shard(replica, addresses) for replica in self._registry.all_replicas],
            membership=inference_pb2.Membership(
                source=self._membership.source,
                last_change=self._membership.last_change,
                seconds_since_change=self._membership.seconds_since_change,
                problems=[f"{source}: {reason}" for source, reason in self._membership.problems.items() if addresses],
            ),
        )

    def _route(self, route: RouteConfig) -> inference_pb2.RouteDescription:
        """A route as the file describes it; its parameters are 0 until every stage has stated its own."""
        stages = [self._stage_of(route, stage) for stage in self._registry.stages[route.name]]
        return inference_pb2.RouteDescription(
            name=route.name,
            bottom_layers=route.bottom_layers,
            top_from=route.top_from,
            stitch=next((stage.stitch for stage in stages if stage.stitch), ""),
            ffn_skip=next((stage.ffn_skip for stage in stages if stage.ffn_skip), ""),
            parameters=sum(stage.parameters for stage in stages) if all(stage.parameters for stage in stages) else 0,
        )

    def _stage_of(self, route: RouteConfig, stage: Iterable[Replica]) -> inference_pb2.RouteDescription:
        """The stitch, the gates and the parameters that any replica of a stage states for its layers of the route."""
        for replica in stage:
            for stated in replica.identity.routes if replica.identity and replica.mismatch is None else ():
                if stated.name == route.name:
                    return stated
        return inference_pb2.RouteDescription()

    def _model(self, role: str, source: ModelConfig) -> inference_pb2.Model:
        """The model of a role as a shard of that role describes it, else as a shard of the other role does."""
        for identity in sorted(self._identities(), key=lambda identity: identity.role != role):
            model: inference_pb2.Model = getattr(identity, role)
            if model.layers:
                return model
        return inference_pb2.Model(id=source.id)

    def _stated(self, field: str) -> list[int]:
        models = self._cluster.models
        both = (self._model("bottom", models.bottom), self._model("top", models.top))
        stated = [getattr(model, field) for model in both if getattr(model, field)]
        if not stated:
            raise Unavailable("no shard of the cluster has answered yet")
        return stated

    def _identities(self) -> Iterator[shard_pb2.ShardIdentity]:
        """The identities of the shards that fit together, those of shards that are gone included."""
        replicas = self._registry.replicas.values()
        return (one.identity for one in replicas if one.identity is not None and one.mismatch is None)


def _shard(replica: Replica, addresses: bool) -> inference_pb2.ShardDescription:
    config = replica.config
    identity = replica.identity or shard_pb2.ShardIdentity()
    return inference_pb2.ShardDescription(
        name=config.name,
        address=config.address if addresses else "",
        role=config.role,
        first_layer=config.layers[0],
        end_layer=config.layers[1],
        device=identity.device,
        dtype=identity.compute_dtype,
        kv_capacity_tokens=identity.kv_capacity_tokens,
        serving=replica.accepts_requests,
        state=replica.state,
    )
