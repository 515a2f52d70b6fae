"""The service `grpc.health.v1.Health`: SERVING while a tokenizer is there and a route accepts requests."""

from __future__ import annotations

from collections.abc import Callable

from grpc_health.v1 import health, health_pb2

from router_gateway.shards.registry import ShardRegistry

# "" is the whole server.
SERVICES = ("", "stitch.v1.Inference")

_STATUS = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


class Health:
    """The servicer and its status."""

    def __init__(self) -> None:
        # The stubs have only the servicer of threaded servers.
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        # What the status of every service is.
        self.serving = False
        self._ends = False

    async def follow(self, registry: ShardRegistry, ready: Callable[[], bool]) -> None:
        """Sets the status by `ready` now and after every change of a shard; never returns."""
        while True:
            version = registry.version
            await self.set(ready())
            await registry.changed_since(version)

    async def set(self, serving: bool) -> None:
        self.serving = serving and not self._ends
        for service in SERVICES:
            await self.servicer.set(service, _STATUS[serving])

    async def shut_down(self) -> None:
        """Sets NOT_SERVING for good; later calls of `set` have no effect."""
        self._ends, self.serving = True, False
        await self.servicer.enter_graceful_shutdown()
