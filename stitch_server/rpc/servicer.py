"""The Shard service: messages to domain calls and back. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from stitch.errors import Incompatible, InvalidRequest, translated_errors
from stitch.sampling import Sampling
from stitch.v1 import shard_pb2, shard_pb2_grpc
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.session import Request, RequestOutput
from stitch_server.engine.types import RouteDecision
from stitch_server.rpc.frames import Assembly, stage_messages, token_message
from stitch_server.rpc.handshake import check_neighbour
from stitch_server.rpc.link_server import UpstreamLink, decoded
from stitch_server.worker.route_probe import fallback_decision

if TYPE_CHECKING:
    from stitch_server.shard import Shard

Context = grpc.aio.ServicerContext[Any, Any]
# Pieces of the tokenizer's files.
PIECE_BYTES = 256 << 10


class ShardServicer(shard_pb2_grpc.ShardServicer):
    """Serves one shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    async def Generate(
        self, request: shard_pb2.ShardGenerateRequest, context: Context
    ) -> AsyncIterator[shard_pb2.ShardGenerateResponse]:
        async with translated_errors(context):
            origin = self._shard.front
            if not isinstance(origin, FirstStage):
                name, role = self._shard.config.name, self._shard.config.role
                raise Incompatible(f"shard {name} holds {role} layers without the embedding: no chain begins here")
            outbox: asyncio.Queue[RequestOutput] = asyncio.Queue()
            session = self._session(request, outbox)
            self._shard.engine.post(partial(origin.admit, session))
            try:
                finished = False
                while not finished:
                    progress = await outbox.get()
                    finished = progress.finish_reason is not None
                    yield _response(progress)
            finally:
                self._shard.engine.post(partial(origin.abandon, session))

    async def Link(
        self, requests: AsyncIterator[shard_pb2.LinkRequest], context: Context
    ) -> AsyncIterator[shard_pb2.LinkResponse]:
        async with translated_errors(context):
            shard = self._shard
            relay = shard.front
            if not isinstance(relay, NextStage):
                raise Incompatible(f"shard {shard.config.name} is the first of its chain: no shard stands before it")
            frames = decoded(requests)
            first = await anext(frames, None)
            if first is None or first.WhichOneof("frame") != "hello":
                raise Incompatible("the first frame of a link must be a hello")
            check_neighbour(first.hello, shard.identity, shard.check_stitch)
            yield shard_pb2.LinkResponse(welcome=shard_pb2.Welcome(identity=shard.identity))
            width = shard.incoming_width(first.hello.identity.role)
            assembly = Assembly(width, shard.identity.wire_dtype, shard.max_step_tokens)
            link = UpstreamLink(shard.engine, relay, assembly, shard.unpack, shard.metrics.link_bytes_received.inc)
            async for response in link.responses(frames):
                yield response

    async def Describe(
        self, request: shard_pb2.ShardDescribeRequest, context: Context
    ) -> shard_pb2.ShardDescribeResponse:
        shard = self._shard
        return shard_pb2.ShardDescribeResponse(
            identity=shard.identity,
            kv_free_tokens=shard.kv_free_tokens,
            running_sessions=shard.front.running_sessions,
            waiting_sessions=shard.front.waiting_sessions,
        )

    async def FetchTokenizer(
        self, request: shard_pb2.FetchTokenizerRequest, context: Context
    ) -> AsyncIterator[shard_pb2.FetchTokenizerResponse]:
        for path in self._shard.tokenizer_files:
            content = await asyncio.to_thread(path.read_bytes)
            for start in range(0, max(1, len(content)), PIECE_BYTES):
                yield shard_pb2.FetchTokenizerResponse(file=path.name, data=content[start : start + PIECE_BYTES])

    def _session(self, request: shard_pb2.ShardGenerateRequest, outbox: asyncio.Queue[RequestOutput]) -> Request:
        shard = self._shard
        model = shard.loaded.model
        _check(request, model.vocabulary_size, model.context_length)
        if request.candidates:
            _check_candidates(request, [route.name for route in shard.cluster.routes])
        candidates = {one.route: tuple(one.chain) for one in request.candidates}
        loop = asyncio.get_running_loop()
        session = Request(
            route="" if candidates else shard.cluster.route(request.route).name,
            chain=tuple(request.chain),
            candidates=candidates,
            sampling=Sampling.from_proto(request.sampling),
            token_ids=list(request.token_ids),
            prompt_tokens=request.prompt_tokens,
            context_length=model.context_length,
            report=lambda progress: _report(loop, outbox, progress),
        )
        if candidates and shard.loaded.probe is None:
            route = shard.cluster.gateway.fallback_route
            session.settle(fallback_decision(route, tuple(candidates), "the first shard has no probe"))
        return session


def _check(request: shard_pb2.ShardGenerateRequest, vocabulary_size: int, context_length: int) -> None:
    tokens = len(request.token_ids)
    if not 1 <= tokens < context_length:
        raise InvalidRequest("token_ids", f"{tokens} tokens", f"there must be 1 to {context_length - 1}")
    if not 1 <= request.prompt_tokens <= tokens:
        raise InvalidRequest("prompt_tokens", request.prompt_tokens, f"it must be 1 to {tokens}")
    largest = max(request.token_ids)
    if largest >= vocabulary_size:
        raise InvalidRequest("token_ids", largest, f"the vocabulary has {vocabulary_size} tokens")
    if not request.candidates and not request.chain:
        raise InvalidRequest("chain", [], "a chain has at least one shard behind the first")


def _check_candidates(request: shard_pb2.ShardGenerateRequest, routes: Sequence[str]) -> None:
    named = [one.route for one in request.candidates]
    if not set(named) <= set(routes) or not 1 < len(named) == len(set(named)):
        limit = f"they must be two or more of {', '.join(routes)}, each once"
        raise InvalidRequest("candidates.route", ", ".join(named), limit)
    if not all(one.chain for one in request.candidates):
        raise InvalidRequest("candidates.chain", [], "a chain has at least one shard behind the first")
    if request.route or request.chain:
        raise InvalidRequest("candidates", ", ".join(named), "they stand instead of route and chain")


def _judged(decision: RouteDecision) -> shard_pb2.ProbeDecision:
    return shard_pb2.ProbeDecision(
        route=decision.route,
        score=decision.score,
        gains=decision.gains,
        thresholds=decision.thresholds,
        failure=decision.failure,
        preferred=decision.preferred,
    )


def _report(loop: asyncio.AbstractEventLoop, outbox: asyncio.Queue[RequestOutput], progress: RequestOutput) -> None:
    """Called in the engine's thread."""
    loop.call_soon_threadsafe(outbox.put_nowait, progress)


def _response(progress: RequestOutput) -> shard_pb2.ShardGenerateResponse:
    if progress.error is not None:
        raise progress.error
    response = shard_pb2.ShardGenerateResponse(stages=stage_messages(progress.stages))
    if progress.decision is not None:
        response.decision.CopyFrom(_judged(progress.decision))
    if progress.token is not None:
        response.tokens.append(token_message(progress.token))
    if progress.finish_reason is not None:
        response.finish_reason = progress.finish_reason
    return response
