"""Many requests in one call: each has its own end."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import grpc
import pytest

from stitch.v1 import inference_pb2
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard, waits_for
from tests.support.waiting import eventually
from tests.unit.router_gateway.conftest import Reach, Reached


def batch(*prompts: str) -> inference_pb2.GenerateBatchRequest:
    return inference_pb2.GenerateBatchRequest(
        requests=[inference_pb2.GenerateRequest(prompt=prompt) for prompt in prompts]
    )


async def run(
    gateway: Reached, request: inference_pb2.GenerateBatchRequest
) -> dict[int, list[inference_pb2.GenerateBatchResponse]]:
    events = defaultdict(list)
    async for event in gateway.stub.GenerateBatch(request):
        events[event.index].append(event)
    return dict(events)


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens("hello world")), FakeShard("top-0", "top")


async def test_a_failing_request_disturbs_no_other(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        events = await run(gateway, batch("one", "", "three"))
    for index in (0, 2):
        assert "".join(event.response.delta.text for event in events[index]) == "hello world"
        assert events[index][-1].response.HasField("finished")
    [failed] = events[1]
    assert failed.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert failed.error.message == "prompt is '', but it must not be empty"


async def test_a_defect_ends_its_own_request_alone(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(message: inference_pb2.GenerateRequest) -> None:
        raise ZeroDivisionError("secret")

    async with reach(*shards()) as gateway:
        monkeypatch.setattr("router_gateway.rpc.batch.to_request", defect)
        events = await run(gateway, batch("one", "two"))
    assert [event.error.code for [event] in events.values()] == [grpc.StatusCode.INTERNAL.value[0]] * 2
    assert "secret" not in events[0][0].error.message


async def test_only_so_many_run_at_once_and_the_rest_waits(reach: Reach) -> None:
    bottom, top = shards()
    hold = asyncio.Event()
    async with reach(bottom, top, batch_at_once=2) as gateway:
        bottom.faults[0] = waits_for(hold)
        first = asyncio.create_task(run(gateway, batch(*["x"] * 5)))
        await eventually(lambda: bottom.running == 1 and gateway.metric("stitch_requests_waiting") is not None)
        hold.set()
        events = await first
        assert gateway.metric("stitch_requests_waiting") == 0
    assert sorted(events) == list(range(5))


async def test_the_bound_holds(reach: Reach) -> None:
    bottom, top = shards()
    hold = asyncio.Event()
    most = 0

    class Holding(dict):  # type: ignore[type-arg]
        """Holds every session before its first token."""

        def __contains__(self, index: object) -> bool:
            nonlocal most
            most = max(most, bottom.running)
            return index == 0

        def pop(self, index: int) -> object:  # type: ignore[override]
            return waits_for(hold)

    bottom.faults = Holding()
    async with reach(bottom, top, batch_at_once=3) as gateway:
        answers = asyncio.create_task(run(gateway, batch(*["x"] * 10)))
        await eventually(lambda: bottom.running == 3)
        assert gateway.metric("stitch_requests_waiting") == 7
        assert gateway.metric("stitch_requests_running") == 3
        hold.set()
        assert len(await answers) == 10
    assert most == 3


async def test_a_client_that_leaves_takes_all_sessions_with_it(reach: Reach) -> None:
    bottom, top = shards()
    async with reach(bottom, top, batch_at_once=1) as gateway:
        bottom.faults[1] = waits_for(asyncio.Event())
        call = gateway.stub.GenerateBatch(batch("one", "two", "three"))
        await call.read()
        await eventually(lambda: not bottom.faults)
        call.cancel()
        await eventually(lambda: bottom.cancelled == 1 and bottom.running == 0)
        await eventually(lambda: gateway.metric("stitch_requests_waiting") == 0)
    assert len(bottom.requests) == 1


async def test_an_empty_batch_has_no_events(reach: Reach) -> None:
    async with reach(*shards()) as gateway:
        assert await run(gateway, batch()) == {}
