"""The service `grpc.health.v1.Health`: SERVING while a tokenizer is there and the route, or any, accepts requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from grpc_health.v1 import health, health_pb2

from router_gateway.shards.registry import ShardRegistry
from stitch.health import route_service

# "" is the whole server.
SERVICES = ("", "stitch.v1.Inference")

_STATUS = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


class Health:
    """The servicer and its status."""

    def __init__(self, routes: Sequence[str]) -> None:
        """`routes` are names; each has a service of its own beside those of the whole server."""
        # The stubs have only the servicer of threaded servers.
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._routes = routes
        # The status of the whole server.
        self.serving = False
        self._ends = False

    async def follow(self, registry: ShardRegistry, ready: Callable[[], Mapping[str, bool]]) -> None:
        """Sets the status by `ready` of each route now and after every change of a shard; never returns."""
        while True:
            version = registry.version
            await self.set(ready())
            await registry.changed_since(version)

    async def set(self, ready: Mapping[str, bool]) -> None:
        """Sets the status of the routes, which are not ready unless given, and of the server: any route will do."""
        serving = any(ready.values())
        self.serving = serving and not self._ends
        for service in SERVICES:
            await self.servicer.set(service, _STATUS[serving])
        for route in self._routes:
            await self.servicer.set(route_service(route), _STATUS[ready.get(route, False)])

    async def shut_down(self) -> None:
        """Sets NOT_SERVING for good; later calls of `set` have no effect."""
        self._ends, self.serving = True, False
        await self.servicer.enter_graceful_shutdown()
