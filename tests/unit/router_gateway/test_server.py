"""Tests of the composed gateway: reflection, metrics, draining, stopping, and its router."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2

from router_gateway.config import GatewaySettings, HealthPolicy
from router_gateway.metrics import EJECTION_CAUSES, REPLAY_CAUSES
from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of, save_router
from router_gateway.routing.router import Query
from router_gateway.server import open_gateway, open_router
from stitch import channels
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard, fake_cluster, waits_for
from tests.support.waiting import eventually
from tests.support.word_model import word_model
from tests.unit.router_gateway.conftest import Reach


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens("hello world")), FakeShard("top-0", "top")


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
async def test_reflection_describes_the_services(reach: Reach, version: str) -> None:
    async with reach(*shards()) as gateway:
        call = gateway.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )

        async def answers(**asked: list[str]) -> list[reflection_pb2.ServerReflectionResponse]:
            requests = [
                reflection_pb2.ServerReflectionRequest(**{field: value})
                for field, values in asked.items()
                for value in values
            ]
            return [answer async for answer in call(iter(requests))]

        [listed] = await answers(list_services=[""])
        names = [service.name for service in listed.list_services_response.service]
        described = await answers(file_containing_symbol=names)
    assert sorted(names) == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "stitch.v1.Inference",
    ]
    files = [FileDescriptorProto.FromString(one.file_descriptor_response.file_descriptor_proto[0]) for one in described]
    assert [f"{file.package}.{file.service[0].name}" for file in files] == names


async def test_metrics_are_served_over_http(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        await gateway.generate()
        url = f"http://127.0.0.1:{gateway.gateway.metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert 'stitch_time_to_first_token_seconds_count{route="weak"} 1.0' in page
    assert 'stitch_time_to_first_token_seconds_count{route="strong"} 0.0' in page


async def test_drain_lets_answers_finish_and_refuses_new_ones(reach: Reach) -> None:
    bottom, top = shards()
    hold = asyncio.Event()
    bottom.faults[1] = waits_for(hold)
    async with reach(bottom, top) as gateway:
        answer = asyncio.create_task(gateway.generate())
        await eventually(lambda: not bottom.faults)
        drain = asyncio.create_task(gateway.gateway.drain(seconds=60))
        await eventually(lambda: gateway.gateway.in_flight.closed)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await gateway.generate()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not drain.done()
        hold.set()
        await drain
        assert "".join(event.delta.text for event in await answer) == "hello world"


async def test_drain_ends_after_its_time_and_stop_cancels(reach: Reach) -> None:
    bottom, top = shards()
    bottom.faults[1] = waits_for(asyncio.Event())
    async with reach(bottom, top) as gateway:
        answer = asyncio.create_task(gateway.generate())
        await eventually(lambda: not bottom.faults)
        await gateway.gateway.drain(seconds=0.01)
        assert not answer.done()
        await gateway.gateway.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await answer
        await eventually(lambda: bottom.cancelled == 1)
        assert gateway.metric("stitch_cancelled_total", cause="shutdown") == 1


async def test_port_in_use_is_an_error(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        listen = f"127.0.0.1:{gateway.gateway.port}"
        taken = GatewaySettings(cluster=gateway.cluster, listen=listen)
        with pytest.raises(OSError, match=listen):
            async with open_gateway(taken):
                pass


async def test_http_port_in_use_is_an_error_and_leaves_no_server(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[grpc.aio.Server] = []
    async with reach(*shards()) as gateway:
        taken = f"127.0.0.1:{gateway.gateway.port}"
        open_server = channels.open_server
        monkeypatch.setattr(channels, "open_server", lambda *given: servers.append(open_server(*given)) or servers[-1])
        with pytest.raises(OSError, match="in use"):
            async with open_gateway(GatewaySettings(cluster=gateway.cluster, http=taken, metrics_port=0)):
                pass
    [server] = servers
    # True: it still runs after that time.
    assert not await server.wait_for_termination(timeout=0.1)


async def test_gateway_without_shards_describes_the_cluster_file() -> None:
    bottom, top = shards()
    async with fake_cluster(bottom, top) as cluster:
        await bottom.stop()
        await top.stop()
        async with (
            open_gateway(GatewaySettings(cluster=cluster)) as gateway,
            grpc.aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel,
        ):
            call = channel.unary_unary(
                "/stitch.v1.Inference/Describe",
                inference_pb2.DescribeRequest.SerializeToString,
                inference_pb2.DescribeResponse.FromString,
            )
            described = await call(inference_pb2.DescribeRequest())
    assert [(shard.name, shard.serving) for shard in described.shards] == [("bottom-0", False), ("top-0", False)]


async def test_invalid_settings_are_refused_before_anything_opens() -> None:
    async with fake_cluster(*shards()) as cluster:
        with pytest.raises(InvalidRequest, match="--insecure"):
            async with open_gateway(GatewaySettings(cluster=cluster, listen="0.0.0.0:0")):
                pass


async def cluster_with(folder: Path, *routes: str) -> ClusterConfig:
    model = word_model({"prove": 0.5, "hello": -0.25}, routes=routes)
    percentiles = tuple(np.linspace(-0.25, 0.5, 101).tolist())
    save_router(
        RouterArtifact(model, (0.1,), percentiles, {"data": []}, fingerprint_of(model)), folder / "r.safetensors"
    )
    async with fake_cluster(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as cluster:
        gateway = cluster.gateway.model_copy(update={"router": "r.safetensors"})
        return cluster.model_copy(update={"gateway": gateway, "folder": folder})


async def test_open_router_opens_the_learned_router(tmp_path: Path) -> None:
    router, calibration = open_router(await cluster_with(tmp_path, "weak", "strong"))
    decisions = [router.decide(Query((text,), ("weak", "strong"))) for text in ("prove it", "hello you")]
    assert [decision.route for decision in decisions] == ["strong", "weak"]
    assert decisions[0].reason == "gain 0.50 > 0.10"
    assert decisions[0].qualities == (0.5, 1.0)
    assert calibration is not None
    assert calibration() is None


async def test_open_router_refuses_a_router_of_other_routes(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="disagree on large, strong"):
        open_router(await cluster_with(tmp_path, "weak", "large"))


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
async def test_one_failed_poll_replays_no_answer(reach: Reach, code: grpc.StatusCode) -> None:
    bottoms = [FakeShard(f"bottom-{index}", "bottom", tokens("hello world")) for index in range(2)]
    tops = [FakeShard(f"top-{index}", "top") for index in range(2)]
    hold = asyncio.Event()
    for shard in bottoms:
        shard.script_waits = hold
    health = HealthPolicy(poll_seconds=0.02, confirm_seconds=5.0)
    async with reach(*bottoms, *tops, health=health) as gateway:
        answers = [asyncio.create_task(gateway.generate()) for _ in range(30)]
        await eventually(lambda: sum(shard.running for shard in bottoms) == len(answers))
        for shard in (*bottoms, *tops):
            shard.describe_faults = [code]
        polls = {shard: shard.polls for shard in (*bottoms, *tops)}
        await eventually(lambda: all(shard.polls > polls[shard] + 1 for shard in polls))
        hold.set()
        await asyncio.gather(*answers)
        assert sum(len(shard.requests) for shard in bottoms) == len(answers)
        assert all(gateway.metric("stitch_replays_total", cause=cause) == 0 for cause in REPLAY_CAUSES)
        assert all(gateway.metric("stitch_ejections_total", cause=cause) == 0 for cause in EJECTION_CAUSES)
