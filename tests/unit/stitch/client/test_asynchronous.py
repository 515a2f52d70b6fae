"""The asyncio client against a fake gateway, as far as it differs from the blocking client."""

from __future__ import annotations

import asyncio

import pytest

from stitch.client import Answer, AsyncClient, Client, Delta, RouteDecision
from stitch.errors import Exhausted, Expired, InvalidRequest, Unavailable
from tests.support.fake_gateway import WAIT_SECONDS, FakeGateway


async def cancelled(gateway: FakeGateway) -> bool:
    return await asyncio.to_thread(gateway.cancelled.wait, WAIT_SECONDS)


async def test_async_and_blocking_client_return_equal_results(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        answer = await client.generate("a b c", logprobs=1)
        decision = await client.route("a b c")
        found = await client.describe()
    with Client(gateway.address) as blocking:
        assert answer == blocking.generate("a b c", logprobs=1)
        assert decision == blocking.route("a b c")
        assert found == blocking.describe()


async def test_stream_yields_events_and_then_has_answer(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        stream = client.stream("a")
        events = [event async for event in stream]
    assert events == [RouteDecision("weak", 0.0625, "1 words", 1), Delta("echo:", (5,), ()), Delta(" a", (1,), ())]
    assert stream.answer.text == "echo: a"


async def test_stream_text_yields_pieces(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        assert [piece async for piece in client.stream("a b").text()] == ["echo:", " a", " b"]


async def test_leaving_stream_cancels_call(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 1
    async with AsyncClient(gateway.address) as client:
        async for event in client.stream("a b c"):
            if isinstance(event, Delta):
                break
        assert await cancelled(gateway)


async def test_leaving_text_cancels_call(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 1
    async with AsyncClient(gateway.address) as client:
        async for _ in client.stream("a b c").text():
            break
        assert await cancelled(gateway)


async def test_cancelled_task_cancels_call(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 1
    first = asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for _ in client.stream("a b c"):
            first.set()

    async with AsyncClient(gateway.address) as client:
        task = asyncio.create_task(read(client))
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(gateway)


async def test_deadline_ends_call(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 1
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(Expired):
            await client.generate("a b c", timeout=0.2)
    assert await cancelled(gateway)


async def test_client_raises_error_of_gateway(gateway: FakeGateway) -> None:
    gateway.failure = lambda request: Exhausted("full", 2.5)
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(Exhausted, match=r"^full$") as caught:
            await client.generate("a")
    assert caught.value.retry_after_seconds == 2.5


async def test_concurrent_requests_share_one_connection(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        answers = await asyncio.gather(*(client.generate(f"query {index}") for index in range(12)))
    assert [answer.text for answer in answers] == [f"echo: query {index}" for index in range(12)]


async def test_batch_returns_one_outcome_per_request_in_order(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        answered, empty, malformed = await client.batch(["a", "", {"prompt": 3}])
    assert isinstance(answered, Answer)
    assert isinstance(empty, InvalidRequest)
    assert isinstance(malformed, InvalidRequest)


async def test_batch_without_gateway_returns_errors() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        assert [type(outcome) for outcome in await client.batch(["a", "b"])] == [Unavailable, Unavailable]


async def test_tokenize_and_detokenize_return_ids_and_text(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        assert await client.tokenize("to be or not") == [2, 2, 2, 3]
        assert await client.tokenize(messages=[{"role": "user", "content": "hi"}]) == [2]
        assert await client.detokenize([1, 3]) == "x xxx"
