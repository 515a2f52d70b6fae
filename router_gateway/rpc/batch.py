"""Many requests in one call: a bounded number at once, each with its own end. Knows no tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from prometheus_client import Gauge

from router_gateway.requests.pipeline import Generator
from router_gateway.rpc.decoding import FAILED
from router_gateway.rpc.messages import to_request, to_response
from stitch.errors import StitchError, to_status
from stitch.v1 import inference_pb2

_log = logging.getLogger(__name__)

# Events that wait for a client who reads slowly; then generating waits, too.
QUEUED_EVENTS = 64

Response = inference_pb2.GenerateBatchResponse


class Batch:
    """One call's requests. `waiting` counts those that wait for their turn."""

    def __init__(self, generator: Generator, at_once: int, waiting: Gauge) -> None:
        self._generator = generator
        self._at_once = at_once
        self._waiting = waiting
        self._events: asyncio.Queue[Response | None] = asyncio.Queue(QUEUED_EVENTS)

    async def responses(
        self, requests: Sequence[inference_pb2.GenerateRequest], arrival: float, deadline: float | None
    ) -> AsyncGenerator[Response, None]:
        """Events of all requests as they come; closing the iterator cancels what still runs."""
        runs = asyncio.create_task(self._run(requests, arrival, deadline))
        try:
            while (event := await self._events.get()) is not None:
                yield event
            await runs
        finally:
            runs.cancel()
            await asyncio.gather(runs, return_exceptions=True)

    async def _run(
        self, requests: Sequence[inference_pb2.GenerateRequest], arrival: float, deadline: float | None
    ) -> None:
        turns = enumerate(requests)
        left = len(requests)
        self._waiting.inc(left)

        async def work() -> None:
            nonlocal left
            for index, request in turns:
                left -= 1
                self._waiting.dec()
                await self._one(index, request, arrival, deadline)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._at_once, len(requests))):
                    group.create_task(work())
        finally:
            self._waiting.dec(left)
        await self._events.put(None)

    async def _one(
        self, index: int, message: inference_pb2.GenerateRequest, arrival: float, deadline: float | None
    ) -> None:
        try:
            events = self._generator.generate(partial(to_request, message), arrival, deadline)
            async with aclosing(events):
                async for event in events:
                    await self._events.put(Response(index=index, response=to_response(event)))
        except StitchError as error:
            await self._events.put(Response(index=index, error=_request_error(error)))
        # A defect that one request meets is no reason to drop the others.
        except Exception:
            _log.exception("request %d of a batch failed", index)
            await self._events.put(Response(index=index, error=_request_error(StitchError(FAILED))))


def _request_error(error: StitchError) -> inference_pb2.RequestError:
    status = to_status(error)
    return inference_pb2.RequestError(code=status.code, message=status.message)
