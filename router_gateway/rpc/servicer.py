"""The service `stitch.v1.Inference`: decodes requests, calls the pipeline, writes its messages, translates errors.

The methods are coroutines that write to the context, not generators: gRPC drops a generator when a client leaves, and
its session would run until it is garbage-collected.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from prometheus_client import Gauge

from router_gateway.admission.tenants import Credentials
from router_gateway.metrics import Metrics
from router_gateway.requests.pipeline import Pipeline
from router_gateway.rpc.callers import credentials_of
from router_gateway.rpc.messages import decode, to_request, to_route_query
from router_gateway.shards.models import ModelRegistry
from stitch.errors import StitchError, to_status, translated_errors
from stitch.process import InFlightTracker
from stitch.v1 import inference_pb2, inference_pb2_grpc

_log = logging.getLogger(__name__)

# What a client is told of a defect; the log has its traceback.
INTERNAL_ERROR = "the gateway failed on this request; its log has the reason"
# Messages of a batch that wait for a slow client; when they are this many, generating waits too.
QUEUED_MESSAGES = 64

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]
BatchResponse = inference_pb2.GenerateBatchResponse


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Needs `DecodingInterceptor`, which decodes its requests and turns every StitchError into a status."""

    def __init__(
        self,
        pipeline: Pipeline,
        models: ModelRegistry,
        in_flight: InFlightTracker,
        metrics: Metrics,
        batch_concurrency: int,
    ) -> None:
        self._pipeline = pipeline
        self._models = models
        self._in_flight = in_flight
        self._metrics = metrics
        self._batch_concurrency = batch_concurrency

    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        arrival = self._pipeline.now()
        with self._in_flight.admit():
            responses = self._pipeline.generate(
                credentials_of(context), partial(to_request, request), arrival, _deadline(arrival, context)
            )
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    async def GenerateBatch(  # type: ignore[override]
        self, request: inference_pb2.GenerateBatchRequest, context: Context
    ) -> None:
        arrival = self._pipeline.now()
        batch = Batch(self._pipeline, credentials_of(context), self._batch_concurrency, self._metrics.requests_waiting)
        with self._in_flight.admit():
            responses = batch.responses(request.requests, arrival, _deadline(arrival, context))
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    async def Route(self, request: inference_pb2.RouteRequest, context: Context) -> inference_pb2.RouteResponse:
        query = to_route_query(request)
        decision, prompt_tokens = await self._pipeline.decide(credentials_of(context), query)
        return inference_pb2.RouteResponse(decision=decision.to_proto(), prompt_tokens=prompt_tokens)

    async def Describe(
        self, request: inference_pb2.DescribeRequest, context: Context
    ) -> inference_pb2.DescribeResponse:
        return self._models.describe()


def _deadline(arrival: float, context: Context) -> float | None:
    """When the client stops waiting, by the clock of `arrival`."""
    # None without a deadline, which the stubs leave out.
    left_seconds: Any = context.time_remaining()
    return None if left_seconds is None else arrival + left_seconds


class Batch:
    """The requests of one call: `concurrency` of them run at a time, and one that fails affects no other.

    The gauge `waiting` counts those that have not started.
    """

    def __init__(self, pipeline: Pipeline, credentials: Credentials, concurrency: int, waiting: Gauge) -> None:
        self._pipeline = pipeline
        self._credentials = credentials
        self._concurrency = concurrency
        self._waiting = waiting
        self._queue: asyncio.Queue[BatchResponse | None] = asyncio.Queue(QUEUED_MESSAGES)

    async def responses(
        self, requests: Sequence[inference_pb2.GenerateRequest], arrival: float, deadline: float | None
    ) -> AsyncGenerator[BatchResponse, None]:
        """The messages of all requests, interleaved; closing the iterator cancels the requests that still run."""
        work = asyncio.create_task(self._run(requests, arrival, deadline))
        try:
            while (response := await self._queue.get()) is not None:
                yield response
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _run(
        self, requests: Sequence[inference_pb2.GenerateRequest], arrival: float, deadline: float | None
    ) -> None:
        remaining = enumerate(requests)
        waiting = len(requests)
        self._waiting.inc(waiting)

        async def worker() -> None:
            nonlocal waiting
            for index, request in remaining:
                waiting -= 1
                self._waiting.dec()
                await self._run_one(index, request, arrival, deadline)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(requests))):
                    group.create_task(worker())
        finally:
            self._waiting.dec(waiting)
        await self._queue.put(None)

    async def _run_one(
        self, index: int, message: inference_pb2.GenerateRequest, arrival: float, deadline: float | None
    ) -> None:
        try:
            responses = self._pipeline.generate(self._credentials, partial(to_request, message), arrival, deadline)
            async with aclosing(responses):
                async for response in responses:
                    await self._queue.put(BatchResponse(index=index, response=response))
        except StitchError as error:
            await self._queue.put(BatchResponse(index=index, error=_request_error(error)))
        # A defect that one request hits must not end the others.
        except Exception:
            _log.exception("request %d of a batch failed", index)
            await self._queue.put(BatchResponse(index=index, error=_request_error(StitchError(INTERNAL_ERROR))))


def _request_error(error: StitchError) -> inference_pb2.RequestError:
    status = to_status(error)
    return inference_pb2.RequestError(code=status.code, message=status.message)


class DecodingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Authenticates the calls of `methods`, then decodes their requests; calls of other methods pass unchanged.

    `methods` maps a method's full path to its request type; `authenticate` raises for a caller who may not call it.

    gRPC's own decoding ends a call with INTERNAL for a string that is not UTF-8 or bytes that are no message. Clients
    get INVALID_ARGUMENT with the field instead. A StitchError becomes its status, any other exception INTERNAL. The
    methods must be coroutines; those with many responses write them to the context.
    """

    def __init__(self, methods: dict[str, type[Message]], authenticate: Callable[[Credentials], object]) -> None:
        self._methods = methods
        self._authenticate = authenticate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        request_type = self._methods.get(handler_call_details.method)
        if request_type is None:
            return handler
        # The stubs have only the handlers of threaded servers.
        method: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrap: Any = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        wrapped: grpc.RpcMethodHandler[Any, Any] = wrap(
            self._decoding(request_type, method), None, handler.response_serializer
        )
        return wrapped

    def _decoding(self, request_type: type[Message], method: Method) -> Method:
        async def decoded(data: bytes, context: Context) -> Any:
            try:
                async with translated_errors(context):
                    # Before the message is parsed, whose size anybody may choose.
                    self._authenticate(credentials_of(context))
                    return await method(decode(request_type, data), context)
            except grpc.aio.AbortError:
                raise
            except Exception:
                _log.exception("a call failed")
                await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_ERROR)

        return decoded


def inference_methods() -> dict[str, type[Message]]:
    """Every method of `stitch.v1.Inference` with its request type."""
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    return {
        f"/{service.full_name}/{method.name}": message_factory.GetMessageClass(method.input_type)
        for method in service.methods
    }
