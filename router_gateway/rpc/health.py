"""Says by `grpc.health.v1` whether the gateway can answer. Knows no request."""

from __future__ import annotations

from collections.abc import Callable

from grpc_health.v1 import health, health_pb2

from router_gateway.shards.registry import ShardRegistry

# "" stands for the whole server.
SERVICES = ("", "stitch.v1.Inference")

_STATUS = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


class Health:
    """The servicer, and what it says."""

    def __init__(self) -> None:
        # The stubs know the servicer of threaded servers only.
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]

    async def follow(self, fleet: ShardRegistry, ready: Callable[[], bool]) -> None:
        """Sets the status anew after every change among the shards, for ever."""
        while True:
            version = fleet.version
            await self.set(ready())
            await fleet.changed_since(version)

    async def set(self, serving: bool) -> None:
        for service in SERVICES:
            await self.servicer.set(service, _STATUS[serving])

    async def leave(self) -> None:
        """NOT_SERVING from now on, whatever happens."""
        await self.servicer.enter_graceful_shutdown()
