"""One request's life: prepare, place, stream, detokenize, finish. Opens no connection of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from router_gateway.metrics import Metrics
from router_gateway.requests.answer import Answer
from router_gateway.requests.failover import Failover, FailoverDependencies
from router_gateway.requests.preparation import Preparation, Prepared
from router_gateway.requests.recorder import Recorder
from router_gateway.requests.stream import TokenStream
from router_gateway.requests.types import Event, Finished, FinishReason, Request, Started
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.selector import Selection
from router_gateway.routing.ttft_predictor import TtftPredictor
from stitch.errors import Unavailable
from stitch.sampling import Sampling


class Generator:
    """Answers requests, any number at once. `stopping` says whether the program is cutting its answers short."""

    def __init__(
        self,
        preparation: Preparation,
        selection: Selection,
        around: FailoverDependencies,
        pace: TtftPredictor,
        metrics: Metrics,
        stopping: Callable[[], bool],
    ) -> None:
        self._preparation = preparation
        self._selection = selection
        self._pace = pace
        self._around = around
        self._metrics = metrics
        self._stopping = stopping

    def now(self) -> float:
        """The moment, on the clock of arrivals and deadlines."""
        return self._around.clock()

    async def judge(self, request: Request) -> tuple[RouteDecision, int]:
        """The judgement and the number of prompt tokens, without generating anything.

        Where the first shard judges, it is asked for one token and left as soon as it has judged.
        """
        question = replace(request, request_id=uuid.uuid4().hex, sampling=Sampling(max_tokens=1))
        prepared = await self._preparation.prepare(question)
        if isinstance(prepared.decision, RouteDecision):
            return prepared.decision, len(prepared.token_ids)
        async with aclosing(self._stream(prepared, None).steps()) as steps:
            async for step in steps:
                if step.decision is not None:
                    return step.decision, len(prepared.token_ids)
        raise Unavailable("the first shard answered without a judgement")

    async def generate(
        self, read: Callable[[], Request], arrival: float, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        """One `Started`, any number of `Delta`s, one `Finished`. Closing the iterator cancels the session.

        `read` makes the request out of what the client sent; called in here, its refusal is counted as well.
        Raises any StitchError; see `Preparation.prepare` and `TokenStream.steps`.
        """
        clock, stopping = self._around.clock, self._stopping
        with Recorder(arrival, deadline, self._pace, self._metrics, clock, stopping) as seen:
            request = read()
            seen.named(request.request_id)
            prepared = await self._preparation.prepare(request, seen.elapsed_seconds)
            seen.prepared(prepared)
            async with aclosing(self._answer(prepared, deadline, seen)) as events:
                async for event in events:
                    yield event

    async def _answer(self, prepared: Prepared, deadline: float | None, seen: Recorder) -> AsyncGenerator[Event, None]:
        answer = Answer(prepared.vocabulary.detokenizer(), prepared.request.stop)
        reason = FinishReason.LENGTH
        if isinstance(prepared.decision, RouteDecision):
            yield self._started(prepared, prepared.decision, seen)
        seen.handed_over()
        async with aclosing(self._stream(prepared, deadline).steps()) as steps:
            async for step in steps:
                if step.decision is not None:
                    yield self._started(prepared, step.decision, seen)
                seen.tokens(len(step.tokens), step.stages)
                if (delta := answer.push(step.tokens)) is not None:
                    seen.text()
                    yield delta
                if answer.stopped:
                    break
                reason = step.finish or reason
        if (delta := answer.finish()) is not None:
            if delta.text:
                seen.text()
            yield delta
        yield _finished(FinishReason.STOP if answer.stopped else reason, prepared, answer, seen)

    def _stream(self, prepared: Prepared, deadline: float | None) -> TokenStream:
        decision = prepared.decision
        routes = (decision.route,) if isinstance(decision, RouteDecision) else decision.routes
        return TokenStream(prepared, Failover(routes, self._around), deadline, self._around.clock)

    def _started(self, prepared: Prepared, decision: RouteDecision, seen: Recorder) -> Started:
        self._selection.take(prepared.request, decision)
        seen.judged(decision)
        return Started(prepared.request.request_id, decision, len(prepared.token_ids))


def _finished(reason: FinishReason, prepared: Prepared, answer: Answer, seen: Recorder) -> Finished:
    seen.finished(reason)
    return Finished(
        reason=reason,
        prompt_tokens=len(prepared.token_ids),
        generated_tokens=answer.generated_tokens,
        ttft_seconds=seen.ttft_seconds,
        total_seconds=seen.elapsed_seconds(),
        stages=seen.stages,
    )
