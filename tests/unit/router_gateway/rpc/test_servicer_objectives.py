"""Tests of objectives and conversations through a whole gateway over fake shards, as a client sees them."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from router_gateway.routing.ttft_predictor import MIN_SAMPLES
from stitch.errors import InvalidRequest, ObjectivesUnmet, from_code, from_rpc_error
from stitch.v1 import inference_pb2
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard
from tests.unit.router_gateway.conftest import Reach, Reached

HARD = "Prove step by step why 12 + 30 = 42, and compare it with 7 * 6; never skip a step."


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens("yes")), FakeShard("top-0", "top")


def objectives(**limits: float) -> inference_pb2.Objectives:
    return inference_pb2.Objectives(**limits)


async def decide(gateway: Reached, prompt: str = "hello", **fields: Any) -> inference_pb2.RouteDecision:
    started = (await gateway.generate(prompt, **fields))[0].started
    return started.decision


async def refused(gateway: Reached, **fields: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.generate(**fields)
    return from_rpc_error(caught.value)


async def measured(gateway: Reached) -> None:
    for route in ("weak", "strong"):
        for _ in range(2 * MIN_SAMPLES):
            await gateway.generate(route=route)


async def test_max_cost_changes_the_route(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        assert (await decide(gateway, HARD)).route == "strong"
        moved = await decide(gateway, HARD, objectives=objectives(max_cost=0.8))
        assert moved.route == "weak"
        assert moved.reason.startswith("cost 0.79 ≤ 0.8 on weak; strong has cost 1.00; otherwise it would be strong (")
        assert gateway.metric("stitch_routed_total", route="weak", reason="objective") == 1


async def test_unmet_objective_is_refused_with_predictions(reach: Reach) -> None:
    bottom, top = shards()
    async with reach(bottom, top) as gateway:
        error = await refused(gateway, objectives=objectives(max_cost=0.5))
        assert isinstance(error, ObjectivesUnmet)
        assert str(error) == "no route meets cost ≤ 0.5: weak has cost 0.79; strong has cost 1.00"
        assert bottom.requests == []
        counted = gateway.metric("stitch_request_duration_seconds_count", route="none", outcome="unmet")
        assert counted == 1


async def test_ttft_is_measured_and_predicted(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        assert (await decide(gateway, objectives=objectives(max_ttft_seconds=1e-6))).reason.endswith(
            "ttft not known yet"
        )
        assert gateway.metric("stitch_ttft_objectives_total", route="weak", outcome="missed") == 1
        await measured(gateway)
        assert isinstance(await refused(gateway, objectives=objectives(max_ttft_seconds=1e-6)), ObjectivesUnmet)
        assert "≤ 60 s" in (await decide(gateway, objectives=objectives(max_ttft_seconds=60))).reason
        assert gateway.metric("stitch_ttft_objectives_total", route="weak", outcome="met") == 1


async def test_min_quality_is_refused_by_the_heuristic_router(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        error = await refused(gateway, objectives=objectives(min_quality=0.5))
        assert isinstance(error, InvalidRequest)
        assert error.field == "objectives.min_quality"


async def test_batch_request_with_unmet_objective_affects_no_other(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        cheap = inference_pb2.GenerateRequest(prompt="hello", objectives=objectives(max_cost=0.1))
        plain = inference_pb2.GenerateRequest(prompt="hello")
        call = gateway.stub.GenerateBatch(inference_pb2.GenerateBatchRequest(requests=[cheap, plain]))
        events = [event async for event in call]
        [error] = [event.error for event in events if event.index == 0]
        assert isinstance(from_code(error.code, error.message), ObjectivesUnmet)
        assert any(event.response.HasField("finished") for event in events if event.index == 1)


async def test_route_rpc_explains_objectives(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        request = inference_pb2.RouteRequest(prompt=HARD, objectives=objectives(max_cost=0.8))
        answer = await gateway.stub.Route(request)
        assert answer.decision.route == "weak"
        assert "strong has cost 1.00" in answer.decision.reason


async def test_conversation_keeps_its_route(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        assert (await decide(gateway, HARD, conversation_id="c")).route == "strong"
        kept = await decide(gateway, "ok", conversation_id="c")
        assert kept.reason.startswith("the conversation keeps strong; the router would take weak (")
        assert gateway.metric("stitch_routed_total", route="strong", reason="conversation") == 1
        asked = await gateway.stub.Route(inference_pb2.RouteRequest(prompt="ok", conversation_id="c"))
        assert asked.decision.route == "strong"
        assert (await decide(gateway, "ok", conversation_id="d")).route == "weak"
