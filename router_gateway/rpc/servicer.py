"""The servicer of `stitch.v1.Inference`. Only translates; what happens to a request is the generator's.

The methods are coroutines that write to the context, not generators: gRPC drops a generator when a client leaves, and
the session behind it would live on until the garbage is collected.
"""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from router_gateway.metrics import Metrics
from router_gateway.requests.pipeline import Generator
from router_gateway.rpc.batch import Batch
from router_gateway.rpc.messages import to_decision, to_question, to_request, to_response
from router_gateway.shards.models import ModelRegistry
from stitch.process import InFlightTracker
from stitch.v1 import inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Runs behind `LenientDecoding`, which turns StitchErrors into statuses."""

    def __init__(
        self,
        generator: Generator,
        catalogue: ModelRegistry,
        in_flight: InFlightTracker,
        metrics: Metrics,
        batch_at_once: int,
    ) -> None:
        self._generator = generator
        self._catalogue = catalogue
        self._in_flight = in_flight
        self._metrics = metrics
        self._batch_at_once = batch_at_once

    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        arrival = self._generator.now()
        with self._in_flight.admit():
            events = self._generator.generate(partial(to_request, request), arrival, _deadline(arrival, context))
            async with aclosing(events):
                async for event in events:
                    await context.write(to_response(event))

    async def GenerateBatch(  # type: ignore[override]
        self, request: inference_pb2.GenerateBatchRequest, context: Context
    ) -> None:
        arrival = self._generator.now()
        batch = Batch(self._generator, self._batch_at_once, self._metrics.requests_waiting)
        with self._in_flight.admit():
            responses = batch.responses(request.requests, arrival, _deadline(arrival, context))
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    async def Route(self, request: inference_pb2.RouteRequest, context: Context) -> inference_pb2.RouteResponse:
        decision, prompt_tokens = await self._generator.judge(to_question(request))
        return inference_pb2.RouteResponse(decision=to_decision(decision), prompt_tokens=prompt_tokens)

    async def Describe(
        self, request: inference_pb2.DescribeRequest, context: Context
    ) -> inference_pb2.DescribeResponse:
        return self._catalogue.describe()


def _deadline(arrival: float, context: Context) -> float | None:
    """When the client stops waiting, on the clock of `arrival`."""
    # None without a deadline, which the stubs don't know.
    left_seconds: Any = context.time_remaining()
    return None if left_seconds is None else arrival + left_seconds
