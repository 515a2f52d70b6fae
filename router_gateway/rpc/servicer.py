"""The service `stitch.v1.Inference`: decodes requests, calls the pipeline, writes its messages, translates errors.

The methods are coroutines that write to the context, not generators: gRPC drops a generator when a client leaves, and
its session would run until it is garbage-collected.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from prometheus_client import Gauge

from router_gateway.admission.tenants import Credentials
from router_gateway.metrics import Metrics
from router_gateway.requests.deltas import QUEUED_MESSAGES
from router_gateway.requests.pipeline import Pipeline
from router_gateway.requests.request_log import RequestLog, Write, client_of, counted
from router_gateway.requests.types import Request
from router_gateway.rpc.callers import credentials_of, traceparent_of
from router_gateway.rpc.messages import BatchEntries, decode, to_prompt, to_request, to_route_query, to_tools
from router_gateway.rpc.receiver import Receiver
from router_gateway.shards.models import ModelRegistry
from stitch.cluster import GatewayLimits
from stitch.errors import StitchError, to_status, translated_errors
from stitch.process import InFlightTracker
from stitch.v1 import inference_pb2, inference_pb2_grpc

_log = logging.getLogger(__name__)

# What a client is told of a defect, with the request's id; the log has its traceback.
INTERNAL_ERROR = "the gateway failed on this request; its log has the reason"
# Of a traceback in the log: a defect may recur with every call.
MAX_TRACEBACK_CHARACTERS = 4_000

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]
BatchResponse = inference_pb2.GenerateBatchResponse


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Needs `ReceivingInterceptor`, which decodes its requests and turns every StitchError into a status."""

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
        self._log = RequestLog(time.monotonic)

    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        arrival = self._pipeline.now()
        with self._in_flight.admit():
            read, write = RequestReader(lambda: request), self._log.of(client_of(context.peer()))
            responses = self._pipeline.generate(
                credentials_of(context), read, arrival, _deadline(arrival, context), write, traceparent_of(context)
            )
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    async def GenerateBatch(  # type: ignore[override]
        self, requests: BatchEntries, context: Context
    ) -> None:
        arrival = self._pipeline.now()
        write, waiting = self._log.of(client_of(context.peer())), self._metrics.requests_waiting
        caller, traceparent = credentials_of(context), traceparent_of(context)
        batch = Batch(self._pipeline, caller, self._batch_concurrency, waiting, write, traceparent)
        with self._in_flight.admit():
            responses = batch.responses(requests, arrival, _deadline(arrival, context))
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    async def Route(self, request: inference_pb2.RouteRequest, context: Context) -> inference_pb2.RouteResponse:
        query = to_route_query(request)
        decision, prompt_tokens = await self._pipeline.decide(credentials_of(context), query)
        return inference_pb2.RouteResponse(decision=decision.to_proto(), prompt_tokens=prompt_tokens)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        prompt, tools, plain = to_prompt(request), to_tools(request.chat), request.omit_special_tokens
        return await self._pipeline.tokenize(credentials_of(context), prompt, tools, plain)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        text = await self._pipeline.detokenize(credentials_of(context), list(request.token_ids))
        return inference_pb2.DetokenizeResponse(text=text)

    async def Describe(
        self, request: inference_pb2.DescribeRequest, context: Context
    ) -> inference_pb2.DescribeResponse:
        return self._models.describe(request.addresses)


def _deadline(arrival: float, context: Context) -> float | None:
    """When the client stops waiting, by the clock of `arrival`."""
    # None without a deadline, which the stubs leave out.
    left_seconds: Any = context.time_remaining()
    return None if left_seconds is None else arrival + left_seconds


class RequestReader:
    """Makes the request of a message; `request_id` is drawn where the client gives none."""

    def __init__(self, message: Callable[[], inference_pb2.GenerateRequest]) -> None:
        self._message = message
        self.request_id = uuid.uuid4().hex

    def __call__(self) -> Request:
        message = self._message()
        message.request_id = self.request_id = message.request_id or self.request_id
        return to_request(message)


class Batch:
    """The requests of one call: `concurrency` of them run at a time, and one that fails affects no other.

    The gauge `waiting` counts those that have not started; `write` logs one line about all.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        credentials: Credentials,
        concurrency: int,
        waiting: Gauge,
        write: Write,
        traceparent: str = "",
    ) -> None:
        self._traceparent = traceparent
        self._pipeline = pipeline
        self._credentials = credentials
        self._concurrency = concurrency
        self._waiting = waiting
        self._write = write
        self._outcomes: Counter[str] = Counter()
        self._queue: asyncio.Queue[BatchResponse | None] = asyncio.Queue(QUEUED_MESSAGES)

    async def responses(
        self, requests: BatchEntries, arrival: float, deadline: float | None
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
            self._log_outcomes(len(requests), self._pipeline.now() - arrival)

    async def _run(self, requests: BatchEntries, arrival: float, deadline: float | None) -> None:
        remaining = iter(range(len(requests)))
        waiting = len(requests)
        self._waiting.inc(waiting)

        async def worker() -> None:
            nonlocal waiting
            for index in remaining:
                waiting -= 1
                self._waiting.dec()
                await self._run_one(index, partial(requests.message, index), arrival, deadline)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(requests))):
                    group.create_task(worker())
        finally:
            self._waiting.dec(waiting)
        await self._queue.put(None)

    async def _run_one(
        self,
        index: int,
        message: Callable[[], inference_pb2.GenerateRequest],
        arrival: float,
        deadline: float | None,
    ) -> None:
        read = RequestReader(message)
        try:
            responses = self._pipeline.generate(
                self._credentials, read, arrival, deadline, self._count, self._traceparent
            )
            async with aclosing(responses):
                async for response in responses:
                    await self._queue.put(BatchResponse(index=index, response=response))
        except StitchError as error:
            await self._queue.put(BatchResponse(index=index, error=_request_error(error)))
        # A defect that one request hits must not end the others.
        except Exception as error:
            internal = StitchError(log_defect(error, read.request_id))
            await self._queue.put(BatchResponse(index=index, error=_request_error(internal)))

    def _count(self, outcome: str, line: str) -> None:
        self._outcomes[outcome] += 1

    def _log_outcomes(self, requests: int, seconds: float) -> None:
        """One line, which counts as a refusal where no request was answered."""
        outcome = next(iter(self._outcomes)) if len(self._outcomes) == 1 else "batch"
        self._write(outcome, f"batch of {requests:,} requests: {counted(self._outcomes)}, {seconds:.3f} s")


def _request_error(error: StitchError) -> inference_pb2.RequestError:
    status = to_status(error)
    return inference_pb2.RequestError(code=status.code, message=status.message)


def log_defect(error: Exception, request_id: str) -> str:
    """Logs a defect without the text of its error, which may quote the request, and returns what a client is told."""
    frames = "".join(traceback.format_tb(error.__traceback__))[-MAX_TRACEBACK_CHARACTERS:]
    name = type(error).__name__
    _log.error("request %s failed: Traceback (most recent call last):\n%s%s", request_id, frames, name)
    return f"{INTERNAL_ERROR}: request {request_id}"


class ReceivingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Authenticates the calls of `methods`, then receives and decodes their requests; other calls pass unchanged.

    `methods` maps a method's full path to its request type; `authenticate` raises for a caller who may not call it.

    gRPC's own decoding ends a call with INTERNAL for a string that is not UTF-8 or bytes that are no message. Clients
    get INVALID_ARGUMENT with the field instead. A StitchError becomes its status, any other exception INTERNAL. The
    methods must be coroutines; those with many responses write them to the context.
    """

    def __init__(
        self,
        methods: dict[str, type[Message]],
        authenticate: Callable[[Credentials], object],
        limits: GatewayLimits,
        receiver: Receiver,
    ) -> None:
        self._methods = methods
        self._authenticate = authenticate
        self._limits = limits
        self._receiver = receiver

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
        # As handlers of streams, the methods read their message themselves, when there is room for it.
        wrap: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        wrapped: grpc.RpcMethodHandler[Any, Any] = wrap(
            self._received(request_type, method), None, handler.response_serializer
        )
        return wrapped

    def _received(self, request_type: type[Message], method: Method) -> Method:
        decoded: Callable[[bytes], Any] = partial(decode, request_type)
        if request_type is inference_pb2.GenerateBatchRequest:
            decoded = partial(BatchEntries, max_requests=self._limits.batch_requests)

        async def received(_: object, context: Context) -> Any:
            message: Any = None
            try:
                async with translated_errors(context):
                    # Before anything is read, whose size anybody may choose.
                    self._authenticate(credentials_of(context))
                    with self._receiver.call():
                        data = await self._receiver.receive(context.read)
                        with self._receiver.held(data):
                            message = decoded(data)
                            return await method(message, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                request_id = getattr(message, "request_id", "") or uuid.uuid4().hex
                await context.abort(grpc.StatusCode.INTERNAL, log_defect(error, request_id))

        return received


def inference_methods() -> dict[str, type[Message]]:
    """Every method of `stitch.v1.Inference` with its request type."""
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    return {
        f"/{service.full_name}/{method.name}": message_factory.GetMessageClass(method.input_type)
        for method in service.methods
    }
