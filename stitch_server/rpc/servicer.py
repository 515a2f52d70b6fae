"""The Shard service: requests to calls of the engine, and their results to responses.

Every request is validated here, before the engine sees it; every StitchError becomes a status.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from stitch.access import check_shard_name
from stitch.errors import Exhausted, Incompatible, InvalidRequest, translated_errors
from stitch.grammar import Grammar
from stitch.logs import name_in_log
from stitch.sampling import Sampling
from stitch.telemetry import NO_SPAN, NO_TRACES, Tracer
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc
from stitch_server.engine.in_flight import WINDOW_STEPS
from stitch_server.engine.request import Request, RequestOutput
from stitch_server.engine.session_table import MAX_STOP_TOKENS, MAX_TENANT_CHARACTERS
from stitch_server.engine.types import RouteDecision
from stitch_server.rpc.frames import MAX_SEGMENTS, StepAssembler, StepLimits, stage_messages, token_message
from stitch_server.rpc.handshake import check_hello, routes_between
from stitch_server.rpc.link_server import UpstreamLink, decoded
from stitch_server.rpc.tensors import WIRE_NAMES, bytes_per_token
from stitch_server.rpc.traces import LinkTraces, record_first_token, start_span
from stitch_server.worker.route_probe import fallback_decision

if TYPE_CHECKING:
    from stitch_server.shard import Shard

Context = grpc.aio.ServicerContext[Any, Any]
HELLO_SECONDS = 10.0
# Links of one upstream shard. It has one; while it restarts, the receiver may not know yet that the last one is dead.
# A further one is refused instead of replacing the oldest: without certificates anybody may claim to be that shard.
MAX_LINKS = 8
# Hidden states that a link may send before they are answered, where that is more than a window of the largest steps.
MIN_WINDOW_BYTES = 64 << 20
# Links that have not said who they are.
MAX_SILENT_LINKS = 64
MIN_TENANT_WEIGHT, MAX_TENANT_WEIGHT = 0.01, 100.0
# The size of the messages in which the tokenizer's files are sent.
PIECE_BYTES = 256 << 10


class ShardServicer(shard_pb2_grpc.ShardServicer):
    """Serves one shard."""

    def __init__(self, shard: Shard, tracer: Tracer = NO_TRACES) -> None:
        self._shard = shard
        self._tracer = tracer
        # By the name of the upstream shard.
        self._links: Counter[str] = Counter()
        self._silent_links = 0

    async def Generate(
        self, request: shard_pb2.ShardGenerateRequest | None, context: Context
    ) -> AsyncIterator[shard_pb2.ShardGenerateResponse]:
        async with translated_errors(context):
            shard, first_stage = self._shard, self._shard.first_stage
            if first_stage is None:
                name, role = shard.config.name, shard.config.role
                raise Incompatible(f"shard {name} holds {role} layers without the embedding: it is no first shard")
            await shard.neighbours.meet(_chain_names(request))
            with shard.in_flight.admit():
                outbox: asyncio.Queue[RequestOutput] = asyncio.Queue()
                generation = self._request(request, outbox)
                generation.deadline = _deadline(context)
                span = start_span(self._tracer, shard.config.name, generation)
                name_in_log(request.request_id if request else "", span.trace_id)
                shard.engine.post(partial(first_stage.admit, generation))
                error = "cancelled"
                try:
                    finished = False
                    while not finished:
                        output = await outbox.get()
                        finished = output.finish_reason is not None
                        if output.stages and span is not NO_SPAN:
                            record_first_token(span, generation, output.stages)
                        if finished or output.error is not None:
                            error = "" if output.error is None else type(output.error).__name__
                        yield _response(output)
                finally:
                    shard.engine.post(partial(first_stage.abandon, generation))
                    span.end(error)

    async def Link(
        self, requests: AsyncIterator[shard_pb2.LinkRequest], context: Context
    ) -> AsyncIterator[shard_pb2.LinkResponse]:
        async with translated_errors(context):
            shard, next_stage = self._shard, self._shard.next_stage
            if next_stage is None:
                raise Incompatible(f"shard {shard.config.name} is the first of its chain: it has no upstream shard")
            frames = decoded(requests)
            hello = await self._hello(frames)
            await shard.neighbours.meet([hello.identity.shard])
            caller, scope = self._admit_link(hello, context)
            with self._counted(caller.shard):
                yield shard_pb2.LinkResponse(welcome=shard_pb2.Welcome(identity=shard.identity))
                assembler = self._assembler(caller)
                routes = routes_between(caller, shard.identity)
                traces = LinkTraces(self._tracer, shard.config.name)
                link = UpstreamLink(
                    shard.engine, next_stage, assembler, shard.in_flight, routes, scope, shard.neighbours.meet, traces
                )
                async for response in link.responses(frames):
                    yield response

    async def _hello(self, frames: AsyncIterator[shard_pb2.LinkRequest]) -> shard_pb2.Hello:
        """The first frame of a link. Raises Incompatible for another one, or where none comes in time."""
        if self._silent_links >= MAX_SILENT_LINKS:
            raise Exhausted(f"{MAX_SILENT_LINKS} links have not said hello yet, which is the limit")
        self._silent_links += 1
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await anext(frames, None)
        except TimeoutError:
            raise Incompatible(f"no hello came within {HELLO_SECONDS:g} s") from None
        finally:
            self._silent_links -= 1
        if first is None or first.WhichOneof("frame") != "hello":
            raise Incompatible("the first frame of a link must be a hello")
        return first.hello

    def _admit_link(self, hello: shard_pb2.Hello, context: Context) -> tuple[shard_pb2.ShardIdentity, str]:
        """Who the caller is, and within which scope its sessions share KV prefixes.

        The scope of a shard with a certificate is its name, so that prefixes survive a reconnect. Without one nobody
        knows who the caller is, and every link is a scope of its own. Raises Forbidden or Incompatible.
        """
        shard, caller = self._shard, hello.identity
        is_certified = check_shard_name(context, shard.neighbours.certified_name(caller.shard))
        check_hello(hello, shard.identity, shard.check_stitch)
        shard.neighbours.check_upstream(caller)
        return caller, caller.shard if is_certified else f"{caller.shard}/{secrets.token_hex(8)}"

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Counts a link for the length of the block. Raises Exhausted where the shard has too many."""
        if self._links[name] >= MAX_LINKS:
            raise Exhausted(f"shard {name} has {MAX_LINKS} links to {self._shard.config.name}, which is the limit")
        self._links[name] += 1
        try:
            yield
        finally:
            self._links[name] -= 1

    def _assembler(self, caller: shard_pb2.ShardIdentity) -> StepAssembler:
        """The assembler of a link, with room for a full window of the largest steps that a shard sends."""
        shard = self._shard
        width, dtype = shard.incoming_width(caller.role), shard.identity.wire_dtype
        largest = (shard.max_prefill_tokens + MAX_SEGMENTS) * bytes_per_token(width, WIRE_NAMES[dtype])
        limits = StepLimits(shard.max_prefill_tokens, max(MIN_WINDOW_BYTES, WINDOW_STEPS * largest))
        return StepAssembler(width, dtype, limits, shard.unpack, shard.metrics.link_bytes_received.inc)

    async def Describe(
        self, request: shard_pb2.ShardDescribeRequest, context: Context
    ) -> shard_pb2.ShardDescribeResponse:
        shard = self._shard
        return shard_pb2.ShardDescribeResponse(
            identity=shard.identity,
            kv_free_tokens=shard.kv_free_tokens,
            running_sessions=shard.running_sessions,
            waiting_sessions=shard.waiting_sessions,
            draining=shard.in_flight.closed,
            suspects=shard.suspects,
        )

    async def FetchTokenizer(
        self, request: shard_pb2.FetchTokenizerRequest, context: Context
    ) -> AsyncIterator[shard_pb2.FetchTokenizerResponse]:
        for path in self._shard.tokenizer_files:
            content = await asyncio.to_thread(path.read_bytes)
            for start in range(0, max(1, len(content)), PIECE_BYTES):
                yield shard_pb2.FetchTokenizerResponse(file=path.name, data=content[start : start + PIECE_BYTES])

    def _request(self, message: shard_pb2.ShardGenerateRequest | None, outbox: asyncio.Queue[RequestOutput]) -> Request:
        """The request of a message. Raises InvalidRequest for None, or for a field outside of its limits."""
        shard = self._shard
        if message is None:
            raise InvalidRequest("request", "these bytes", "it must be a stitch.v1.ShardGenerateRequest")
        model = shard.loaded.model
        _check(message, model.vocabulary_size, model.context_length)
        if message.candidates:
            _check_candidates(message, [route.name for route in shard.cluster.routes])
            for one in message.candidates:
                shard.neighbours.check_first(one.route)
                shard.neighbours.check_chain(one.route, one.chain, "candidates.chain")
        else:
            shard.neighbours.check_first(message.route)
            shard.neighbours.check_chain(message.route, message.chain)
        candidates = {one.route: (*shard.first_hop, *one.chain) for one in message.candidates}
        loop = asyncio.get_running_loop()
        request = Request(
            route=message.route,
            chain=() if candidates else (*shard.first_hop, *message.chain),
            candidates=candidates,
            sampling=Sampling.from_proto(message.sampling),
            token_ids=list(message.token_ids),
            prompt_tokens=message.prompt_tokens,
            grammar=Grammar.from_proto(message.grammar) if message.HasField("grammar") else None,
            tenant=message.tenant,
            tenant_weight=message.tenant_weight or 1.0,
            traceparent=message.traceparent,
            context_length=model.context_length,
            vocabulary_size=model.vocabulary_size,
            # Called in the engine's thread.
            on_output=lambda output: _put(loop, outbox, output),
        )
        if shard.loaded.head is not None and shard.loaded.ending & {message.route, *candidates}:
            _check_answer_tokens(message.sampling, shard.loaded.head.vocabulary_size)
        if candidates and shard.loaded.probe is None:
            route = shard.cluster.gateway.fallback_route
            request.take_route(fallback_decision(route, tuple(candidates), "the first shard has no probe"))
        return request


class LenientDecoding(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Gives the Shard's methods None for bytes that are no message, for which gRPC would end the call as a defect."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        # The stubs have only the handlers of threaded servers.
        handler: Any = await continuation(handler_call_details)
        own = handler_call_details.method.startswith("/stitch.v1.Shard/")
        if own and handler is not None and not handler.request_streaming:
            handler = handler._replace(request_deserializer=partial(_decode, handler.request_deserializer))
        return handler  # type: ignore[no-any-return]


def _decode(decode: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decode(data)
    except DecodeError:
        return None


def _chain_names(request: shard_pb2.ShardGenerateRequest | None) -> list[str]:
    """The names of shards in a request."""
    return [] if request is None else [*request.chain, *(name for one in request.candidates for name in one.chain)]


def _check(request: shard_pb2.ShardGenerateRequest, vocabulary_size: int, context_length: int) -> None:
    tokens = len(request.token_ids)
    if not 1 <= tokens < context_length:
        raise InvalidRequest("token_ids", f"{tokens} tokens", f"there must be 1 to {context_length - 1}")
    if not 1 <= request.prompt_tokens <= tokens:
        raise InvalidRequest("prompt_tokens", request.prompt_tokens, f"it must be 1 to {tokens}")
    forced, stop = request.sampling.forced_token_ids, request.sampling.stop_token_ids
    given = {"token_ids": request.token_ids, "sampling.forced_token_ids": forced}
    for field, ids in (given | {"sampling.logit_bias": request.sampling.logit_bias}).items():
        if (largest := max(ids, default=0)) >= vocabulary_size:
            raise InvalidRequest(field, largest, f"the vocabulary has {vocabulary_size} tokens")
    # Both travel on the link, whose frames are limited.
    for field, count, limit in ("forced", len(forced), context_length), ("stop", len(stop), MAX_STOP_TOKENS):
        if count > limit:
            raise InvalidRequest(f"sampling.{field}_token_ids", f"{count} ids", f"it holds at most {limit}")
    if len(request.tenant) > MAX_TENANT_CHARACTERS:
        raise InvalidRequest("tenant", request.tenant, f"it has at most {MAX_TENANT_CHARACTERS} characters")
    # 0 is a weight that is not set; NaN is outside, too.
    if request.tenant_weight != 0 and not MIN_TENANT_WEIGHT <= request.tenant_weight <= MAX_TENANT_WEIGHT:
        allowed = f"it must be {MIN_TENANT_WEIGHT:g} to {MAX_TENANT_WEIGHT:g}"
        raise InvalidRequest("tenant_weight", request.tenant_weight, allowed)


def _check_answer_tokens(sampling: inference_pb2.Sampling, logits: int) -> None:
    """Raises InvalidRequest for a forced or biased token without a logit, such as one that pads the vocabulary."""
    for field, ids in ("forced_token_ids", sampling.forced_token_ids), ("logit_bias", sampling.logit_bias):
        if (largest := max(ids, default=0)) >= logits:
            raise InvalidRequest(f"sampling.{field}", largest, f"the head has {logits} logits")


def _check_candidates(request: shard_pb2.ShardGenerateRequest, routes: Sequence[str]) -> None:
    named = [one.route for one in request.candidates]
    if not set(named) <= set(routes) or not 1 < len(named) == len(set(named)):
        limit = f"they must be two or more of {', '.join(routes)}, each once"
        raise InvalidRequest("candidates.route", ", ".join(named), limit)
    if request.route or request.chain:
        raise InvalidRequest("candidates", ", ".join(named), "route and chain must be empty where candidates are given")


def _decision_message(decision: RouteDecision) -> shard_pb2.ProbeDecision:
    return shard_pb2.ProbeDecision(
        route=decision.route,
        score=decision.score,
        gains=decision.gains,
        thresholds=decision.thresholds,
        failure=decision.failure,
        preferred=decision.preferred,
    )


def _deadline(context: Context) -> float | None:
    """The call's deadline in seconds of the engine's clock; None where it has none."""
    left_seconds: Any = context.time_remaining()
    return None if left_seconds is None else time.perf_counter() + left_seconds


def _put(loop: asyncio.AbstractEventLoop, outbox: asyncio.Queue[RequestOutput], output: RequestOutput) -> None:
    loop.call_soon_threadsafe(outbox.put_nowait, output)


def _response(output: RequestOutput) -> shard_pb2.ShardGenerateResponse:
    if output.error is not None:
        raise output.error
    stages = stage_messages(output.stages)
    response = shard_pb2.ShardGenerateResponse(stages=stages, cached_tokens=output.cached_tokens)
    if output.decision is not None:
        response.decision.CopyFrom(_decision_message(output.decision))
    if output.token is not None:
        response.tokens.append(token_message(output.token))
    if output.finish_reason is not None:
        response.finish_reason = output.finish_reason
    return response
