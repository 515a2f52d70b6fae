"""Tests of the health service: it follows the shards, and stays NOT_SERVING once the gateway shuts down."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router_gateway.config import GatewaySettings
from router_gateway.rpc.health import SERVICES, Health
from router_gateway.server import open_gateway
from stitch import channels
from stitch.health import route_service
from tests.support.fake_shard import FakeShard, fake_cluster
from tests.unit.router_gateway.conftest import QUICK, Reach

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")


@pytest.mark.parametrize("service", SERVICES)
async def test_status_follows_the_shards(reach: Reach, service: str) -> None:
    bottom, top = shards()
    async with reach(bottom, top) as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        statuses = aiter(health.Watch(health_pb2.HealthCheckRequest(service=service)))
        assert (await anext(statuses)).status == SERVING
        await top.stop()
        assert (await anext(statuses)).status == NOT_SERVING
        await top.start()
        assert (await anext(statuses)).status == SERVING


async def test_status_is_not_serving_while_the_only_replica_drains(reach: Reach) -> None:
    bottom, top = shards()
    async with reach(bottom, top) as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        statuses = aiter(health.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(statuses)).status == SERVING
        top.draining = True
        assert (await anext(statuses)).status == NOT_SERVING
        top.draining = False
        assert (await anext(statuses)).status == SERVING


async def test_each_route_has_a_status_of_its_own() -> None:
    routes = {"weak": SERVING, "strong": NOT_SERVING, "unknown": None}
    servicer = Health(["weak", "strong"])
    await servicer.set({"weak": True})
    server = channels.open_server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer.servicer, server)
    port = channels.listen(server, "127.0.0.1:0")
    await server.start()
    async with channels.open_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for route, status in routes.items():
            request = health_pb2.HealthCheckRequest(service=route_service(route))
            if status is not None:
                assert (await health.Check(request)).status == status
                continue
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await health.Check(request)
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
    await server.stop(None)


async def test_nothing_serves_without_tokenizer() -> None:
    bottom, top = shards()
    bottom.files = {"tokenizer.json": b"{}"}
    async with (
        fake_cluster(bottom, top) as cluster,
        open_gateway(GatewaySettings(cluster=cluster, **QUICK)) as gateway,
        channels.open_channel(f"127.0.0.1:{gateway.port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for service in (*SERVICES, *(route_service(route.name) for route in cluster.routes)):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await health.Check(request)).status == NOT_SERVING


async def test_status_stays_not_serving_after_shutdown(reach: Reach) -> None:
    bottom, top = shards()
    async with reach(bottom, top) as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        await gateway.gateway.drain(0)
        await gateway.gateway.health.set({"weak": True})
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING


async def test_unknown_service_is_not_found(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="else"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watcher_does_not_delay_the_shutdown(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        watch = health_pb2_grpc.HealthStub(gateway.channel).Watch(health_pb2.HealthCheckRequest())
        await anext(aiter(watch))
        await asyncio.wait_for(gateway.gateway.drain(seconds=600), timeout=10)
        await asyncio.wait_for(gateway.gateway.stop(), timeout=10)
