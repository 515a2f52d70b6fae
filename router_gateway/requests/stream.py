"""The tokens of one answer, over as many chains as it takes: a prepared request in, steps of tokens out.

When a chain is lost, the prompt and all tokens so far are sent to another one. The shard's sampler draws by seed and
position, so the continuation is the same as without the loss, and no token comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from router_gateway.requests.failover import ChainLost, Failover
from router_gateway.routing.probe import from_probe
from router_gateway.routing.router import DeferredDecision, RouteDecision
from router_gateway.shards.placement import CandidateChains, Chain
from stitch.errors import Draining, Exhausted, Expired, StitchError, from_rpc_error
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2, shard_pb2

FinishReason: TypeAlias = inference_pb2.FinishReason
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

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Raises Unavailable where no chain is left, Expired, or the error that a shard raised."""
        while not (finish := self._finished()):
            chain = await self._failover.next_chain(self._length, len(self._generated))
            try:
                async with aclosing(self._session(chain)) as steps:
                    async for step in steps:
                        yield step
                return
            except (ChainLost, Exhausted) as error:
                # The client retries a new request by itself; an answer in progress waits for room.
                if isinstance(error, Exhausted) and not self._generated:
                    raise
                await self._failover.record_failure(chain, error, len(self._generated))
        yield Step(finish=finish)

    @property
    def _length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self._input.token_ids) + len(self._generated)

    async def _session(self, chain: Chain) -> AsyncGenerator[Step, None]:
        """The steps of one chain up to the last one. Raises ChainLost where the chain ends before."""
        async with aclosing(open_session(chain, self._message(chain), self._left_seconds())) as responses:
            async for response in responses:
                step = self._step(response)
                yield step
                if step.finish:
                    return
        raise ChainLost("cut", f"{chain.names[0]} ended the stream before the answer was complete")

    def _finished(self) -> FinishReason:
        """Why the answer is complete, for the case that its last token came and the message of its end was lost."""
        sampling = self._input.sampling
        if self._generated and self._generated[-1] in sampling.stop_token_ids:
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
        )
        if isinstance(chain, CandidateChains):
            for route, candidate in chain.by_route.items():
                message.candidates.add(route=route, chain=candidate.next_names)
        else:
            message.route = self._failover.routes[0]
            message.chain.extend(chain.next_names)
        return message

    def _step(self, response: shard_pb2.ShardGenerateResponse) -> Step:
        """Checks a response and counts its tokens. Raises ChainLost where it contradicts the answer so far."""
        decision = self._shard_decision(response)
        for position, token in enumerate(response.tokens, self._length):
            if token.position != position:
                raise ChainLost("out_of_step", f"token {token.position} came in place of {position}")
        stages = () if self._generated else response.stages
        self._generated += [token.id for token in response.tokens]
        if response.tokens:
            self._failover.record_progress()
        complete = response.finish_reason in _COMPLETE
        finish = response.finish_reason if complete else inference_pb2.FINISH_REASON_UNSPECIFIED
        return Step(response.tokens, stages, finish, decision)

    def _shard_decision(self, response: shard_pb2.ShardGenerateResponse) -> RouteDecision | None:
        """The first shard's decision, where it has to make one. Raises ChainLost where that is no candidate."""
        routes, deferred = self._failover.routes, self._input.decision
        if len(routes) == 1 or not isinstance(deferred, DeferredDecision):
            return None
        decision = deferred.finalize(from_probe(response.decision))
        if decision.route != response.decision.route or decision.route not in routes:
            chosen = response.decision.route or "none"
            raise ChainLost("out_of_step", f"the first shard chose {chosen} of the routes {', '.join(routes)}")
        self._failover.fix_route(decision.route)
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
    chain: Chain, request: shard_pb2.ShardGenerateRequest, timeout_seconds: float | None
) -> AsyncGenerator[shard_pb2.ShardGenerateResponse, None]:
    """The responses of the chain's first shard; closing this iterator cancels the session on every shard.

    Raises ChainLost, or the StitchError that a shard raised.
    """
    call = chain.first.generate(request, timeout_seconds)
    with chain.on_unavailable(call.cancel):
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _session_error(error) from error
        except asyncio.CancelledError:
            # The call's cancellation because a shard is gone looks like a cancellation of this task.
            task = asyncio.current_task()
            if chain.serving or (task is not None and task.cancelling()):
                raise
            raise ChainLost("unreachable", f"a shard of {', '.join(chain.names)} does not answer") from None
        finally:
            call.cancel()


def _session_error(error: grpc.aio.AioRpcError) -> Exception:
    code, message = error.code(), error.details() or ""
    # A process that is killed in the middle of a frame may leave only a reset stream.
    if code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.INTERNAL and "RST_STREAM" in message):
        return ChainLost("draining" if isinstance(from_rpc_error(error), Draining) else "unavailable", message)
    if code is grpc.StatusCode.CANCELLED:
        return ChainLost("cancelled", message)
    known = from_rpc_error(error)
    return known if isinstance(known, StitchError) else StitchError(f"a shard failed: {message}")
