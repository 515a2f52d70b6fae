"""Tests of receiving within limits: calls, bytes, and requests that do not arrive."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from router_gateway.rpc.receiver import Receiver
from stitch.cluster import GatewayLimits
from stitch.errors import Exhausted, Expired, InvalidRequest


async def never() -> None:
    await asyncio.Event().wait()


async def arrived() -> bytes:
    return b"request"


async def test_call_beyond_the_most_is_refused_until_another_ends() -> None:
    receiver = Receiver(GatewayLimits(calls=1))
    with receiver.call():
        with pytest.raises(Exhausted, match="1 calls, its most"), receiver.call():
            pass
        assert await receiver.receive(arrived) == b"request"
    with receiver.call():
        pass


def test_bytes_beyond_the_budget_are_refused_until_others_are_released() -> None:
    receiver = Receiver(GatewayLimits(in_flight_bytes=1_024))
    with receiver.held(bytes(1_000)):
        with pytest.raises(Exhausted, match="have 1,000 bytes of at most 1,024"), receiver.held(bytes(25)):
            pass
        with receiver.held(bytes(24)):
            pass
    with receiver.held(bytes(1_024)):
        pass


async def test_request_that_does_not_arrive_in_time_expires() -> None:
    receiver = Receiver(GatewayLimits(receive_seconds=0.01))
    with pytest.raises(Expired, match="not arrived in time"):
        await receiver.receive(never)


async def test_call_without_request_is_refused() -> None:
    async def end() -> object:
        return grpc.aio.EOF

    with pytest.raises(InvalidRequest, match="the call has none"):
        await Receiver(GatewayLimits()).receive(end)


async def test_oldest_calls_without_request_are_ended_beyond_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver(GatewayLimits(receiving_calls=2))
    waiting = [asyncio.create_task(receiver.receive(never)) for _ in range(4)]
    await asyncio.sleep(0)
    with receiver.call():
        # They are young.
        assert not any(call.done() for call in waiting)
    monkeypatch.setattr("router_gateway.rpc.receiver.GRACE_SECONDS", 0.0)
    with receiver.call():
        done, rest = await asyncio.wait(waiting, return_when=asyncio.ALL_COMPLETED, timeout=0.1)
    assert done == set(waiting[:2])
    assert all(isinstance(call.exception(), Expired) for call in done)
    for call in rest:
        call.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
