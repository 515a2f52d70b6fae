"""The tokens of one answer, over as many chains as it takes: a prepared request in, steps of tokens out.

When a chain is lost, the prompt and all tokens so far are sent to another one. The shard's sampler draws by seed and
position, so the continuation is the same as without the loss, and no token comes twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from router_gateway.requests.failover import ChainLost, Failover
from router_gateway.routing.probe import from_probe
from router_gateway.routing.router import DeferredDecision, RouteDecision
from router_gateway.shards.compatibility import Facts
from router_gateway.shards.placement import CandidateChains, Chain, PlacedSession
from stitch.errors import (
    Draining,
    Exhausted,
    Expired,
    Forbidden,
    Incompatible,
    StitchError,
    Unauthenticated,
    Unavailable,
    from_rpc_error,
    has_details,
)
from stitch.grammar import Grammar
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2, shard_pb2

_log = logging.getLogger(__name__)

FinishReason: TypeAlias = inference_pb2.FinishReason
# A shard ends a call by these where it has a defect.
_FAILED = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS)
_COMPLETE = (inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH)


@dataclass(frozen=True, slots=True)
class StreamInput:
    """What shards compute an answer from."""

    request_id: str
    token_ids: tuple[int, ...]
    decision: RouteDecision | DeferredDecision
    # With max_tokens limited to the context, and the model's own end tokens among stop_token_ids.
    sampling: Sampling
    # Empty: no tenant is known.
    tenant: str = ""
    tenant_weight: float = 1.0
    # W3C `traceparent` for the first shard's span; empty: no trace.
    traceparent: str = ""
    # What the shards must have in common with the gateway: its tokenizer.
    facts: Facts = field(default_factory=dict)
    # What the answer matches; None: anything.
    grammar: Grammar | None = None

    @property
    def routes(self) -> tuple[str, ...]:
        """The one that is decided, or the candidates."""
        return (self.decision.route,) if isinstance(self.decision, RouteDecision) else self.decision.routes


@dataclass(frozen=True, slots=True)
class Step:
    """What one message of the first shard adds to the answer."""

    tokens: Sequence[shard_pb2.GeneratedToken] = ()
    # With the first token.
    stages: Sequence[inference_pb2.Stage] = ()
    # With the first token: prompt tokens whose KV was cached.
    cached_tokens: int = 0
    # On the last step, else unspecified.
    finish: FinishReason = inference_pb2.FINISH_REASON_UNSPECIFIED
    # The first shard's decision where it was deferred: once, before the first token.
    decision: RouteDecision | None = None


class TokenStream:
    """Iterate over `steps` once; close it to cancel the session on every shard.

    `deadline` is when the client stops waiting, in seconds of `clock`.
    """

    def __init__(
        self, given: StreamInput, failover: Failover, deadline: float | None, clock: Callable[[], float]
    ) -> None:
        self._input = given
        self._failover = failover
        self._deadline = deadline
        self._clock = clock
        self._generated: list[int] = []
        # The one that the latest tokens came from.
        self.chain: Chain | None = None

    @property
    def replays(self) -> int:
        """How often the answer went on with other shards."""
        return self._failover.replays

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Raises Unavailable where no chain is left, Expired, or the error that a shard raised."""
        while not (finish := self._finished()):
            chain = await self._failover.next_chain(self._reserved_tokens, len(self._generated))
            session = self._failover.place(chain, self._length)
            try:
                with session:
                    async with aclosing(self._session(session)) as steps:
                        async for step in steps:
                            yield step
                return
            except (ChainLost, Exhausted) as error:
                await self._failover.record_failure(session, error, len(self._generated))
        yield Step(finish=finish)

    @property
    def _length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self._input.token_ids) + len(self._generated)

    @property
    def _reserved_tokens(self) -> int:
        """Tokens of prompt and longest answer."""
        return len(self._input.token_ids) + self._input.sampling.max_tokens

    async def _session(self, session: PlacedSession) -> AsyncGenerator[Step, None]:
        """The steps of one chain up to the last one. Raises ChainLost where the chain ends before."""
        message = self._message(session.chain)
        async with aclosing(open_session(session, message, self._left_seconds())) as responses:
            async for response in responses:
                step = self._step(session, response)
                yield step
                if step.finish:
                    return
        first = session.chain.names[0]
        raise ChainLost("cut", f"{first} ended the stream before the answer was complete", first)

    def _finished(self) -> FinishReason:
        """Why the answer is complete, for the case that its last token came and the message of its end was lost."""
        sampling = self._input.sampling
        if self._generated and sampling.ends_at(self._generated[-1], len(self._generated)):
            return inference_pb2.FINISH_REASON_STOP
        if len(self._generated) >= sampling.max_tokens:
            return inference_pb2.FINISH_REASON_LENGTH
        return inference_pb2.FINISH_REASON_UNSPECIFIED

    def _message(self, chain: Chain) -> shard_pb2.ShardGenerateRequest:
        given = self._input
        message = shard_pb2.ShardGenerateRequest(
            request_id=given.request_id,
            token_ids=[*given.token_ids, *self._generated],
            prompt_tokens=len(given.token_ids),
            sampling=given.sampling.to_proto(),
            tenant=given.tenant,
            tenant_weight=given.tenant_weight,
            grammar=None if given.grammar is None else given.grammar.to_proto(),
            traceparent=given.traceparent,
        )
        if isinstance(chain, CandidateChains):
            for route, candidate in chain.by_route.items():
                message.candidates.add(route=route, chain=candidate.next_names)
        else:
            message.route = self._failover.routes[0]
            message.chain.extend(chain.next_names)
        return message

    def _step(self, session: PlacedSession, response: shard_pb2.ShardGenerateResponse) -> Step:
        """Checks a response and counts its tokens. Raises ChainLost where it contradicts the answer so far."""
        session.record(len(response.tokens))
        decision = self._shard_decision(session, response)
        for position, token in enumerate(response.tokens, self._length):
            if token.position != position:
                raise ChainLost("out_of_step", f"token {token.position} came in place of {position}")
        stages, cached = ((), 0) if self._generated else (response.stages, response.cached_tokens)
        self._generated += [token.id for token in response.tokens]
        if response.tokens:
            self._failover.record_progress(session)
            self.chain = session.chain
        complete = response.finish_reason in _COMPLETE
        finish = response.finish_reason if complete else inference_pb2.FINISH_REASON_UNSPECIFIED
        return Step(response.tokens, stages, cached, finish, decision)

    def _shard_decision(
        self, session: PlacedSession, response: shard_pb2.ShardGenerateResponse
    ) -> RouteDecision | None:
        """The first shard's decision, where it has to make one. Raises ChainLost where that is no candidate."""
        routes, deferred = self._failover.routes, self._input.decision
        if len(routes) == 1 or not isinstance(deferred, DeferredDecision):
            return None
        decision = deferred.finalize(from_probe(response.decision))
        if decision.route != response.decision.route or decision.route not in routes:
            chosen = response.decision.route or "none"
            raise ChainLost("out_of_step", f"the first shard chose {chosen} of the routes {', '.join(routes)}")
        self._failover.fix_route(decision.route)
        session.take_route(decision.route)
        return decision

    def _left_seconds(self) -> float | None:
        """Until the client's deadline; None without one. Raises Expired after it."""
        if self._deadline is None:
            return None
        left = self._deadline - self._clock()
        if left <= 0:
            raise Expired(f"the deadline passed after {len(self._generated):,} tokens")
        return left


async def open_session(
    session: PlacedSession, request: shard_pb2.ShardGenerateRequest, timeout_seconds: float | None
) -> AsyncGenerator[shard_pb2.ShardGenerateResponse, None]:
    """The responses of the chain's first shard; closing this iterator cancels the session on every shard.

    Raises ChainLost, or the StitchError that a shard raised.
    """
    call = session.chain.first.generate(request, timeout_seconds)
    session.cancel = call.cancel
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise _session_error(error, session.chain.names[0]) from error
    except asyncio.CancelledError:
        # The call's cancellation for a silent shard looks like a cancellation of this task.
        task, silent = asyncio.current_task(), session.silent_shard
        if not silent or (task is not None and task.cancelling()):
            raise
        raise ChainLost("unreachable", f"{silent} does not answer", silent) from None
    finally:
        session.cancel = None
        call.cancel()


def _session_error(error: grpc.aio.AioRpcError, first: str) -> Exception:
    """What the status of a `Generate` on the shard `first` means for its answer."""
    code, known = error.code(), from_rpc_error(error)
    message = error.details() or ""
    if not has_details(error):
        # gRPC's own words have the shard's address, which is nothing for a client.
        _log.info("shard %s: %s: %s", first, code.name, message)
        message = f"{first} ended with {code.name}"
    if isinstance(known, Draining):
        return ChainLost("draining", message, known.shard)
    if isinstance(known, Unavailable):
        # Without the shard's own words the connection to it failed.
        return ChainLost("unavailable", message, known.shard if has_details(error) else first)
    if isinstance(known, Incompatible):
        return ChainLost("incompatible", message, final=known)
    if isinstance(known, (Unauthenticated, Forbidden)):
        _log.error("shard %s refuses a session: %s: %s", first, code.name, message)
        return ChainLost("unavailable", "a shard refuses the gateway", first)
    # A process that is killed in the middle of a frame may leave only a reset stream.
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in (error.details() or ""):
        return ChainLost("unavailable", message, first)
    if code is grpc.StatusCode.CANCELLED:
        return ChainLost("cancelled", message, first)
    if code in _FAILED:
        return ChainLost("failed", f"a shard failed: {message}", first)
    return known if isinstance(known, StitchError) else StitchError(f"a shard failed: {message}")
