"""Tests of keys on gRPC calls, through a whole gateway over fake shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router_gateway.admission.tenants import hash_key
from stitch.client.messages import key_metadata
from stitch.v1 import inference_pb2
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard
from tests.unit.router_gateway.conftest import Reach, Reached

KEY = "stitch-the-key"
REQUEST = inference_pb2.GenerateRequest(prompt="hello", sampling=inference_pb2.Sampling(max_tokens=8))


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens("hello world")), FakeShard("top-0", "top")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """The fields of a gateway whose only tenant is `blue`."""
    file = tmp_path / "keys.toml"
    file.write_text(f'[tenants.blue]\nkeys = ["{hash_key(KEY)}"]\nweight = 2\nmax_tokens = 8\nroutes = ["weak"]\n')
    return {"keys": str(file)}


async def call_all(gateway: Reached, metadata: tuple[tuple[str, str], ...]) -> list[grpc.StatusCode]:
    """The statuses of all methods in the order of the service."""
    requests: dict[str, Any] = {
        "Generate": inference_pb2.GenerateRequest(prompt="hello", route="weak"),
        "GenerateBatch": inference_pb2.GenerateBatchRequest(requests=[REQUEST]),
        "Route": inference_pb2.RouteRequest(prompt="hello"),
        "Describe": inference_pb2.DescribeRequest(),
    }
    return [await status_of(getattr(gateway.stub, name)(one, metadata=metadata)) for name, one in requests.items()]


async def status_of(call: Any) -> grpc.StatusCode:
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError:
        pass
    assert "secret" not in str(await call.details())
    code: grpc.StatusCode = await call.code()
    return code


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer secret"),), (("authorization", f"Basic {KEY}"),)])
async def test_calls_without_a_tenants_key_are_unauthenticated(
    reach: Reach, keys: dict[str, Any], metadata: tuple[tuple[str, str], ...]
) -> None:
    bottom, top = shards()
    async with reach(bottom, top, cluster=keys) as gateway:
        assert await call_all(gateway, metadata) == [grpc.StatusCode.UNAUTHENTICATED] * 4
    assert bottom.requests == []


async def test_calls_with_the_key_are_the_tenants(reach: Reach, keys: dict[str, Any]) -> None:
    bottom, top = shards()
    async with reach(bottom, top, cluster=keys) as gateway:
        statuses = await call_all(gateway, key_metadata(KEY))
        # The router may choose a route that is not the tenant's, so a route has to be named.
        assert statuses == [
            grpc.StatusCode.OK,
            grpc.StatusCode.OK,
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.OK,
        ]
    [request] = bottom.requests
    assert (request.tenant, request.tenant_weight, request.sampling.max_tokens) == ("blue", 2.0, 8)


async def test_health_needs_no_key(reach: Reach, keys: dict[str, Any]) -> None:
    async with reach(*shards(), cluster=keys) as gateway:
        answer = await health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_key_is_checked_before_the_message_is_parsed(reach: Reach, keys: dict[str, Any]) -> None:
    async with reach(*shards(), cluster=keys) as gateway:
        call = gateway.channel.unary_unary("/stitch.v1.Inference/Route")(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("field", ["max_tokens", "route"])
async def test_limits_of_the_tenant_are_named(reach: Reach, keys: dict[str, Any], field: str) -> None:
    request = inference_pb2.GenerateRequest(prompt="hello", route="weak")
    if field == "route":
        request.route = "strong"
    else:
        request.sampling.max_tokens = 9
    async with reach(*shards(), cluster=keys) as gateway:
        with pytest.raises(grpc.aio.AioRpcError, match="tenant blue"):
            async for _ in gateway.stub.Generate(request, metadata=key_metadata(KEY)):
                pass


async def test_requests_without_a_keys_file_are_of_the_default_tenant(reach: Reach) -> None:
    bottom, top = shards()
    async with reach(bottom, top, cluster={"default_deadline_seconds": 50}) as gateway:
        await gateway.generate()
    assert bottom.requests[0].tenant == "default"
    [deadline] = bottom.deadlines
    assert deadline is not None
    assert 40 < deadline <= 51
