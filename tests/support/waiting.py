"""Waits until a condition becomes true, with and without an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TRY_AGAIN_SECONDS = 0.005


async def eventually(happened: Callable[[], object], timeout_seconds: float = 10.0) -> None:
    """Returns as soon as `happened()` is true. Raises TimeoutError after `timeout_seconds`."""
    give_up = time.monotonic() + timeout_seconds
    while not happened():
        if time.monotonic() > give_up:
            raise TimeoutError(f"it did not happen within {timeout_seconds:g} s")
        await asyncio.sleep(TRY_AGAIN_SECONDS)


async def until_serving(channel: grpc.aio.Channel) -> None:
    """Returns as soon as the server of the channel reports SERVING."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
    async for answer in watch:
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            watch.cancel()
            return


def becomes_true(happened: Callable[[], bool], timeout_seconds: float) -> bool:
    """Whether `happened()` becomes true within that time; for tests without an event loop."""
    give_up = time.monotonic() + timeout_seconds
    while not (result := happened()) and time.monotonic() < give_up:
        time.sleep(TRY_AGAIN_SECONDS)
    return result
