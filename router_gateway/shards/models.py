"""What models and routes the cluster serves, by its file and by what its shards say. Knows no request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import Replica
from stitch.cluster import ClusterConfig, ModelConfig, RouteConfig, ShardConfig
from stitch.errors import Unavailable
from stitch.v1 import inference_pb2, shard_pb2


class ModelRegistry:
    """Merges the cluster file with the shards' identities; those are kept while a shard is away."""

    def __init__(self, cluster: ClusterConfig, fleet: ShardRegistry) -> None:
        self._cluster = cluster
        self._fleet = fleet

    @property
    def context_tokens(self) -> int:
        """The longest prompt and answer together that both models take, and that every shard has KV for.

        Raises Unavailable before the first shard has said it.
        """
        capacities = [identity.kv_capacity_tokens for identity in self._identities() if identity.kv_capacity_tokens]
        return min(self._stated("context_length") + capacities)

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this; the models' vocabularies may be padded differently."""
        return max(self._stated("vocabulary_size"))

    def routes(self) -> list[str]:
        """Names of the routes, cheapest first: by parameters read for a token, or by layers until all are known."""
        parameters = {route.name: self._route(route).parameters for route in self._cluster.routes}
        known = all(parameters.values())
        cheapest_first = sorted(
            self._cluster.routes, key=lambda route: (parameters[route.name] if known else 0, route.bottom_layers)
        )
        return [route.name for route in cheapest_first]

    def costs(self) -> dict[str, float]:
        """Parameters read for a token by route, as a share of the most; empty until all are known."""
        parameters = {route.name: self._route(route).parameters for route in self._cluster.routes}
        most = max(parameters.values())
        return {name: count / most for name, count in parameters.items()} if all(parameters.values()) else {}

    def describe(self) -> inference_pb2.DescribeResponse:
        return inference_pb2.DescribeResponse(
            cluster=self._cluster.name,
            bottom=self._model("bottom", self._cluster.models.bottom),
            top=self._model("top", self._cluster.models.top),
            routes=[self._route(self._cluster.route(name)) for name in self.routes()],
            shards=[_shard(replica) for replica in self._fleet.replicas.values()],
        )

    def _route(self, route: RouteConfig) -> inference_pb2.RouteDescription:
        """The cut as the file has it; parameters are 0 until every stage of the route has said what it reads."""
        said = [self._said_of(route, stage) for stage in self._cluster.stages(route)]
        return inference_pb2.RouteDescription(
            name=route.name,
            bottom_layers=route.bottom_layers,
            top_from=route.top_from,
            stitch=next((part.stitch for part in said if part.stitch), ""),
            parameters=sum(part.parameters for part in said) if all(part.parameters for part in said) else 0,
        )

    def _said_of(self, route: RouteConfig, stage: Iterable[ShardConfig]) -> inference_pb2.RouteDescription:
        """What any replica of a stage says of its own part of the route."""
        for place in stage:
            identity = self._fleet.replicas[place.name].identity
            for part in identity.routes if identity is not None else ():
                if part.name == route.name:
                    return part
        return inference_pb2.RouteDescription()

    def _model(self, role: str, source: ModelConfig) -> inference_pb2.Model:
        """As a shard of that role describes its own model, or as its neighbour does."""
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
        return (replica.identity for replica in self._fleet.replicas.values() if replica.identity is not None)


def _shard(replica: Replica) -> inference_pb2.ShardDescription:
    place: ShardConfig = replica.place
    identity = replica.identity or shard_pb2.ShardIdentity()
    return inference_pb2.ShardDescription(
        name=place.name,
        address=place.address,
        role=place.role,
        first_layer=place.layers[0],
        end_layer=place.layers[1],
        device=identity.device,
        dtype=identity.compute_dtype,
        kv_capacity_tokens=identity.kv_capacity_tokens,
        serving=replica.serving,
    )
