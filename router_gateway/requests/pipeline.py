"""One request, top to bottom: prepare, wait for room, stream the tokens of each answer as deltas, finish.

In goes a `Request`, out come the messages of its answers: `started` once, and for each any number of `delta`s and
`finished` once. Every refusal is raised before a shard is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from router_gateway.admission.admission import Admission, Demand, Ticket
from router_gateway.admission.tenants import Credentials
from router_gateway.metrics import Metrics
from router_gateway.requests.answer_format import tool_call_parser
from router_gateway.requests.deltas import DeltaBuilder, interleaved
from router_gateway.requests.failover import Failover, FailoverDependencies
from router_gateway.requests.preparer import Prepared, RequestPreparer, within_tenant
from router_gateway.requests.recorder import Recorder
from router_gateway.requests.request_log import Write, write_line
from router_gateway.requests.request_trace import RequestTrace
from router_gateway.requests.stream import StreamInput, TokenStream
from router_gateway.requests.types import Prompt, Request, Tools
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.selector import Selector, Wait
from router_gateway.routing.ttft_predictor import TrackedRequest, TtftPredictor
from router_gateway.shards.placement import Chain
from router_gateway.shards.placement import Prompt as PlacedPrompt
from stitch.errors import Unavailable
from stitch.sampling import Sampling
from stitch.telemetry import NO_SPAN, NO_TRACES, Span, Tracer
from stitch.v1 import inference_pb2

Response = inference_pb2.GenerateResponse


@dataclass(slots=True)
class AnswersInCommon:
    """What the answers to one request share."""

    unfinished: int
    # The first answer has its first token: the others can reuse the KV of the prompt on the shards of this chain.
    prompt_computed: asyncio.Event = field(default_factory=asyncio.Event)
    decision: RouteDecision | None = None
    chain: Chain | None = None


class Pipeline:
    """Answers requests, any number at the same time. `aborting` returns whether running answers are being ended."""

    def __init__(
        self,
        preparer: RequestPreparer,
        selector: Selector,
        dependencies: FailoverDependencies,
        admission: Admission,
        predictor: TtftPredictor,
        metrics: Metrics,
        aborting: Callable[[], bool],
        tracer: Tracer = NO_TRACES,
    ) -> None:
        self._tracer = tracer
        self._preparer = preparer
        self._selector = selector
        self._dependencies = dependencies
        self._admission = admission
        self._predictor = predictor
        self._metrics = metrics
        self._aborting = aborting

    def now(self) -> float:
        """The time by the clock of arrivals and deadlines, in seconds."""
        return self._dependencies.clock()

    async def tokenize(
        self, credentials: Credentials, prompt: Prompt, tools: Tools | None = None, plain: bool = False
    ) -> inference_pb2.TokenizeResponse:
        """The tokens of a prompt. Raises Unauthenticated, and as `RequestPreparer.tokenize` does."""
        self._admission.authenticate(credentials)
        return await self._preparer.tokenize(prompt, tools, plain)

    async def detokenize(self, credentials: Credentials, ids: Sequence[int]) -> str:
        """The text of token ids. Raises Unauthenticated, and as `RequestPreparer.detokenize` does."""
        self._admission.authenticate(credentials)
        return await self._preparer.detokenize(ids)

    async def decide(self, credentials: Credentials, request: Request) -> tuple[RouteDecision, int]:
        """The route of a query and its number of prompt tokens, without an answer.

        A deferred decision is the first shard's: its session asks for one token and is closed once it has decided.
        """
        query = replace(request, request_id=uuid.uuid4().hex, sampling=Sampling(max_tokens=1), n=1)
        with self._admission.admit(credentials, _demand(query, None)) as ticket:
            prepared = await self._preparer.prepare(within_tenant(query, ticket.tenant))
            decision = prepared.stream_input.decision
            if isinstance(decision, RouteDecision):
                return decision, prepared.prompt_tokens
            await self._start_on_shards(prepared, ticket)
            async with aclosing(self._stream(prepared.stream_input, ticket).steps()) as steps:
                async for step in steps:
                    if step.decision is not None:
                        return step.decision, prepared.prompt_tokens
        raise Unavailable("the first shard answered without a route decision")

    async def generate(
        self,
        credentials: Credentials,
        read: Callable[[], Request],
        arrival: float,
        deadline: float | None,
        write: Write = write_line,
        traceparent: str = "",
    ) -> AsyncGenerator[Response, None]:
        """The messages of a request's answers. Closing the iterator cancels their sessions on every shard.

        `read` makes the request from the client's message; it is called here so that its refusal is recorded too.
        `write` logs the request. `traceparent` is the client's, as W3C's Trace Context has it.
        Raises any StitchError; see `Admission.admit`, `RequestPreparer.prepare` and `TokenStream.steps`.
        """
        trace, clock = RequestTrace(self._tracer, traceparent, arrival, self.now()), self._dependencies.clock
        with Recorder(arrival, deadline, self._metrics, clock, self._aborting, write, trace) as recorder:
            request = read()
            recorder.record_request(request)
            with self._admission.admit(credentials, _demand(request, deadline)) as ticket:
                request = within_tenant(request, ticket.tenant)
                prepared = await self._preparer.prepare(request, partial(_wait, recorder, ticket))
                recorder.record_prompt(prepared.prompt_tokens, request.routing.objectives.max_ttft_seconds)
                recorder.record_wait(await self._start_on_shards(prepared, ticket))
                with self._predictor.track(prepared.prompt_tokens) as tracked, ticket.refusals():
                    async with aclosing(self._answers(prepared, ticket, recorder, tracked)) as responses:
                        async for response in responses:
                            yield response

    def _answers(
        self, prepared: Prepared, ticket: Ticket, recorder: Recorder, tracked: TrackedRequest
    ) -> AsyncGenerator[Response, None]:
        """The first answer's shards compute the prompt; the others start then, and reuse its KV there."""
        common = AnswersInCommon(prepared.request.n)
        answers = [
            self._answer(prepared, ticket, recorder, tracked, common, index) for index in range(prepared.request.n)
        ]
        return answers[0] if len(answers) == 1 else interleaved(answers)

    async def _answer(
        self,
        prepared: Prepared,
        ticket: Ticket,
        recorder: Recorder,
        tracked: TrackedRequest,
        common: AnswersInCommon,
        index: int,
    ) -> AsyncGenerator[Response, None]:
        given, request = prepared.input_of(index), prepared.request
        if index:
            await common.prompt_computed.wait()
            given = replace(given, decision=common.decision or given.decision)
        elif isinstance(given.decision, RouteDecision):
            yield self._start(prepared, given.decision, recorder, tracked)
        if not index:
            recorder.record_placement()
        parser = tool_call_parser(request.tools, prepared.vocabulary)
        min_tokens, scored = prepared.stream_input.sampling.min_tokens, 0 if index else prepared.scored_tokens
        builder = DeltaBuilder(prepared.vocabulary, request.stop, parser, min_tokens, scored)
        reason, cached_tokens = inference_pb2.FINISH_REASON_LENGTH, 0
        stream = self._stream(given, ticket, common.chain, recorder.trace.span)
        async with aclosing(stream.steps()) as steps:
            async for step in steps:
                if step.decision is not None:
                    common.decision = step.decision
                    yield self._start(prepared, step.decision, recorder, tracked)
                if step.tokens:
                    tracked.prompt_computed()
                    ticket.record_tokens(len(step.tokens))
                    recorder.record_tokens(len(step.tokens), step.stages, index)
                    cached_tokens += step.cached_tokens
                    common.chain = common.chain or stream.chain
                    common.prompt_computed.set()
                if (delta := builder.push(step.tokens)) is not None:
                    yield _delta(delta, recorder, tracked, index)
                if builder.stopped:
                    break
                reason = step.finish or reason
        if (delta := builder.finish()) is not None:
            yield _delta(delta, recorder, tracked, index)
        reason = inference_pb2.FINISH_REASON_STOP if builder.stopped else reason
        if reason == inference_pb2.FINISH_REASON_STOP and builder.calls_tools:
            reason = inference_pb2.FINISH_REASON_TOOL_CALLS
        ticket.record_finish(builder.generated_tokens, at_limit=reason == inference_pb2.FINISH_REASON_LENGTH)
        common.unfinished -= 1
        if not common.unfinished:
            recorder.record_finish(reason)
        finished = inference_pb2.Finished(
            reason=reason,
            prompt_tokens=prepared.prompt_tokens,
            generated_tokens=builder.generated_tokens,
            ttft_seconds=recorder.ttft_seconds.get(index),
            total_seconds=recorder.elapsed_seconds(),
            stages=() if index else recorder.stages,
            cached_tokens=cached_tokens,
            replays=stream.replays,
        )
        yield Response(finished=finished, answer=index)

    async def _start_on_shards(self, prepared: Prepared, ticket: Ticket) -> float:
        """Waits until shards have room for the request, and returns for how many seconds."""
        began, given, request = self.now(), prepared.input_of(0), prepared.request
        is_exact = request.forced_answer is not None or (given.sampling.ignore_eos and not request.stop)
        is_exact = is_exact or bool(prepared.scored_tokens)
        await ticket.start(given.routes[-1], len(given.token_ids), given.sampling.max_tokens, is_exact)
        return self.now() - began

    def _stream(
        self, given: StreamInput, ticket: Ticket, chain: Chain | None = None, span: Span = NO_SPAN
    ) -> TokenStream:
        """The tokens of one answer, if possible on that chain; its sessions and replays are recorded under `span`."""
        tenant = ticket.tenant
        given = replace(given, tenant=tenant.name, tenant_weight=tenant.weight, traceparent=span.traceparent)
        prompt = PlacedPrompt(given.tenant, given.token_ids)
        failover = Failover(given.routes, self._dependencies, given.facts, prompt, chain, span)
        return TokenStream(given, failover, ticket.deadline, self._dependencies.clock)

    def _start(
        self, prepared: Prepared, decision: RouteDecision, recorder: Recorder, tracked: TrackedRequest
    ) -> Response:
        self._selector.record(prepared.request.routing, decision)
        recorder.record_decision(decision)
        tracked.route = decision.route
        return Response(
            started=inference_pb2.Started(
                request_id=prepared.request.request_id,
                decision=decision.to_proto(),
                prompt_tokens=prepared.prompt_tokens,
            )
        )


def _delta(delta: inference_pb2.Delta, recorder: Recorder, tracked: TrackedRequest, answer: int) -> Response:
    if delta.text:
        recorder.record_text(answer)
        tracked.text_sent()
    return Response(delta=delta, answer=answer)


def _demand(request: Request, deadline: float | None) -> Demand:
    max_tokens = request.sampling.max_tokens if request.sets_max_tokens else None
    return Demand(max_tokens, request.routing.route, deadline, partial(_digest, request), request.n)


def _digest(request: Request) -> bytes:
    """Of what a client sends again when it comes back; where it sets no seed, each request is drawn another one."""
    sampling = replace(request.sampling, seed=0)
    content = (request.prompt, sampling, request.stop, request.routing, request.forced_answer, request.n)
    asked = repr((content, request.response_format, request.tools))
    return hashlib.blake2b(asked.encode(errors="surrogatepass"), digest_size=16).digest()


def _wait(recorder: Recorder, ticket: Ticket) -> Wait:
    """Until shards have room for a request."""
    seconds, pressure = ticket.expected_wait()
    return Wait(recorder.elapsed_seconds() + seconds, pressure)
