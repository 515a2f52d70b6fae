"""Fixtures: a gateway in this process over fake shards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from socketserver import BaseServer
from typing import Any

import grpc
import pytest

from router_gateway.config import GatewaySettings, HealthPolicy, RetryPolicy
from router_gateway.server import Gateway, open_gateway
from stitch import channels
from stitch.cluster import ClusterConfig
from stitch.telemetry import NO_TRACES, Tracer
from stitch.v1 import inference_pb2, inference_pb2_grpc
from tests.support.fake_shard import FakeShard, fake_cluster
from tests.support.waiting import until_serving

QUICK = {
    "health": HealthPolicy(poll_seconds=0.02, poll_timeout_seconds=0.5, confirm_seconds=0.1, max_failed_polls=1),
    "retry": RetryPolicy(wait_seconds=5.0, first_pause_seconds=0.01),
}


@dataclass
class Reached:
    """A gateway with a channel to it and its cluster."""

    gateway: Gateway
    channel: grpc.aio.Channel
    stub: Any
    cluster: ClusterConfig

    async def generate(self, prompt: str = "hello", **fields: Any) -> list[inference_pb2.GenerateResponse]:
        """All messages of one answer."""
        request = inference_pb2.GenerateRequest(**({"prompt": prompt} | fields))
        return [event async for event in self.stub.Generate(request)]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.gateway.metrics.registry.get_sample_value(name, labels)


Reach = Callable[..., AbstractAsyncContextManager[Reached]]


@pytest.fixture(autouse=True)
def _metrics_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The metrics' HTTP server checks only every half second whether it was stopped.
    monkeypatch.setattr(BaseServer.serve_forever, "__defaults__", (0.01,))


@pytest.fixture
def reach() -> Reach:
    """Opens a gateway over these shards and waits until it serves."""

    @asynccontextmanager
    async def opened(
        *shards: FakeShard, cluster: dict[str, Any] | None = None, tracer: Tracer = NO_TRACES, **settings: Any
    ) -> AsyncIterator[Reached]:
        async with fake_cluster(*shards, **(cluster or {})) as described:
            given = GatewaySettings(cluster=described, **(QUICK | settings))
            async with AsyncExitStack() as stack:
                gateway = await stack.enter_async_context(open_gateway(given, tracer=tracer))
                channel = await stack.enter_async_context(channels.open_channel(f"127.0.0.1:{gateway.port}"))
                await until_serving(channel)
                yield Reached(gateway, channel, inference_pb2_grpc.InferenceStub(channel), described)

    return opened
