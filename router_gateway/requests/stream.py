"""One session's tokens, over as many chains as it takes. Knows no text.

When a chain is lost, the prompt and the tokens so far go to another one. The shard's sampler draws by seed and
position, so the answer goes on as if nothing had happened, and no token comes twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from router_gateway.requests.attempt import ChainLost, attempt
from router_gateway.requests.failover import Failover
from router_gateway.requests.preparation import Prepared
from router_gateway.requests.types import FinishReason, Stage, Token
from router_gateway.routing.probe import decision_of
from router_gateway.routing.router import DeferredDecision, RouteDecision
from router_gateway.shards.placement import CandidateChains, Chain
from stitch.errors import Exhausted, Expired
from stitch.v1 import inference_pb2, shard_pb2

_FINISH = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclass(frozen=True, slots=True)
class Step:
    """What came at once."""

    tokens: tuple[Token, ...]
    # With the first token.
    stages: tuple[Stage, ...] = ()
    # On the last step.
    finish: FinishReason | None = None
    # Where it was deferred: once, before the first token.
    decision: RouteDecision | None = None


class TokenStream:
    """Iterate over `steps` once; close it to cancel the session.

    `deadline` is when the client stops waiting, in seconds of `clock`.
    """

    def __init__(
        self, prepared: Prepared, resumption: Failover, deadline: float | None, clock: Callable[[], float]
    ) -> None:
        self._prepared = prepared
        self._resumption = resumption
        self._deadline = deadline
        self._clock = clock
        self._generated: list[int] = []

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Raises Unavailable where no chain is left, Expired, or what a shard raised."""
        while (finish := self._finished()) is None:
            chain = await self._resumption.next_chain(self._length, len(self._generated))
            try:
                async with aclosing(self._session(chain)) as steps:
                    async for step in steps:
                        yield step
                return
            except (ChainLost, Exhausted) as error:
                # A new request is told to come back; an answer that is half told waits for room.
                if isinstance(error, Exhausted) and not self._generated:
                    raise
                await self._resumption.lost(chain, error, len(self._generated))
        yield Step((), finish=finish)

    @property
    def _length(self) -> int:
        return len(self._prepared.token_ids) + len(self._generated)

    async def _session(self, chain: Chain) -> AsyncGenerator[Step, None]:
        """Steps up to the last one. Raises ChainLost before it."""
        async with aclosing(attempt(chain, self._message(chain), self._left_seconds())) as responses:
            async for response in responses:
                step = self._step(response)
                yield step
                if step.finish is not None:
                    return
        raise ChainLost("cut", f"{chain.names[0]} ended the stream before the answer's end")

    def _finished(self) -> FinishReason | None:
        """The end where the last token came, but the word that it is the last one was lost."""
        sampling = self._prepared.sampling
        if self._generated and self._generated[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self._generated) >= sampling.max_tokens else None

    def _message(self, chain: Chain) -> shard_pb2.ShardGenerateRequest:
        prepared = self._prepared
        message = shard_pb2.ShardGenerateRequest(
            request_id=prepared.request.request_id,
            token_ids=[*prepared.token_ids, *self._generated],
            prompt_tokens=len(prepared.token_ids),
            sampling=prepared.sampling.to_proto(),
        )
        if isinstance(chain, CandidateChains):
            for route, branch in chain.branches.items():
                message.candidates.add(route=route, chain=branch.rest)
        else:
            message.route = self._resumption.routes[0]
            message.chain.extend(chain.rest)
        return message

    def _judgement(self, response: shard_pb2.ShardGenerateResponse) -> RouteDecision | None:
        """What the first shard decided, where it was asked to. Raises ChainLost where it does something else."""
        routes, deferred = self._resumption.routes, self._prepared.decision
        if len(routes) == 1 or not isinstance(deferred, DeferredDecision):
            return None
        decision = deferred.finalize(decision_of(response.decision))
        if decision.route != response.decision.route or decision.route not in routes:
            taken = response.decision.route or "none"
            raise ChainLost("out_of_step", f"the first shard took {taken} of the routes {', '.join(routes)}")
        self._resumption.settle(decision.route)
        return decision

    def _step(self, response: shard_pb2.ShardGenerateResponse) -> Step:
        decision = self._judgement(response)
        for position, token in enumerate(response.tokens, self._length):
            if token.position != position:
                raise ChainLost("out_of_step", f"token {token.position} came in place of {position}")
        stages = () if self._generated else tuple(Stage(stage.name, stage.seconds) for stage in response.stages)
        self._generated += [token.id for token in response.tokens]
        if response.tokens:
            self._resumption.progressed()
        return Step(tuple(map(_token, response.tokens)), stages, _FINISH.get(response.finish_reason), decision)

    def _left_seconds(self) -> float | None:
        """Until the client's deadline. Raises Expired behind it."""
        if self._deadline is None:
            return None
        left = self._deadline - self._clock()
        if left <= 0:
            raise Expired(f"the deadline passed after {len(self._generated):,} tokens")
        return left


def _token(token: shard_pb2.GeneratedToken) -> Token:
    return Token(token.id, token.logprobs if token.HasField("logprobs") else None)
