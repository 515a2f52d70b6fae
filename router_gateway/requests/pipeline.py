"""One request, top to bottom: check, tokenize, select a route, stream tokens, detokenize, finish.

In goes a `Request`, out come the messages of its answers: `started` once, and for each any number of `delta`s and
`finished` once. Every refusal is raised before a shard is asked. Texts are tokenized on the event loop where they are
short, else in a thread (`tokenization/text_queues.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from router_gateway.admission.admission import Admission, Demand, Ticket
from router_gateway.admission.tenants import Credentials, Tenant
from router_gateway.metrics import Metrics
from router_gateway.requests import limits
from router_gateway.requests.answer_format import answer_grammar, tool_call_parser, tool_syntax
from router_gateway.requests.failover import Failover, FailoverDependencies
from router_gateway.requests.recorder import Recorder
from router_gateway.requests.request_log import Write, write_line
from router_gateway.requests.request_trace import RequestTrace
from router_gateway.requests.stream import StreamInput, TokenStream
from router_gateway.requests.types import Prompt, Request, TokenIds, Tools, user_turns
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.selector import Selector
from router_gateway.routing.ttft_predictor import TrackedRequest, TtftPredictor
from router_gateway.shards.models import ModelRegistry
from router_gateway.shards.placement import Chain
from router_gateway.shards.placement import Prompt as PlacedPrompt
from router_gateway.tokenization.chat_template import TemplateRefusal, ToolCall, Turn
from router_gateway.tokenization.control_tokens import ControlTokenInText
from router_gateway.tokenization.source import VocabularySource
from router_gateway.tokenization.stop_strings import StopStrings
from router_gateway.tokenization.text_queues import TextQueues
from router_gateway.tokenization.tool_calls import ToolCallParser
from router_gateway.tokenization.vocabulary import TextTooLong, Vocabulary
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest, Unavailable, shown
from stitch.grammar import Grammar
from stitch.sampling import Sampling
from stitch.telemetry import NO_SPAN, NO_TRACES, Span, Tracer
from stitch.v1 import inference_pb2, shard_pb2

Response = inference_pb2.GenerateResponse

# A token's text, by which decoding is queued.
BYTES_PER_TOKEN = 4
# Messages of several answers that wait for a slow client; when they are this many, generating waits too.
QUEUED_MESSAGES = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that has passed every check, with what its answer is made from."""

    request: Request
    stream_input: StreamInput
    vocabulary: Vocabulary

    @property
    def prompt_tokens(self) -> int:
        return len(self.stream_input.token_ids)

    def input_of(self, answer: int) -> StreamInput:
        """What shards compute an answer from: its own seed and, for the prompt's log-probabilities, forced tokens."""
        given = self.stream_input
        if answer or not self.scored_tokens:
            return replace(given, sampling=given.sampling.of_answer(answer))
        sampling, count = given.sampling, self.scored_tokens
        forced = replace(
            sampling,
            forced_token_ids=(*given.token_ids[1:], *sampling.forced_token_ids),
            max_tokens=sampling.max_tokens + count,
            min_tokens=sampling.min_tokens + count,
        )
        return replace(given, token_ids=given.token_ids[:1], sampling=forced)

    @property
    def scored_tokens(self) -> int:
        """Tokens of the prompt whose log-probabilities come before the first answer: all but the first."""
        return self.prompt_tokens - 1 if self.request.prompt_logprobs else 0


class RequestPreparer:
    """Checks and tokenizes requests, and selects their routes."""

    def __init__(
        self,
        cluster: ClusterConfig,
        models: ModelRegistry,
        source: VocabularySource,
        selector: Selector,
        queues: TextQueues,
    ) -> None:
        self._cluster = cluster
        self._models = models
        self._source = source
        self._selector = selector
        self._queues = queues

    async def prepare(self, request: Request, waited_seconds: Callable[[], float] = lambda: 0.0) -> Prepared:
        """Raises InvalidRequest, ObjectivesUnmet, Exhausted, or Unavailable before the first shard has answered.

        `waited_seconds` returns the time since the request's arrival.
        """
        if request.routing.route is not None:
            self._cluster.route(request.routing.route)
        limits.check_prompt(request.prompt)
        vocabulary, facts = self._source.require(), self._source.facts
        sampling, smallest = request.sampling, min(self._models.vocabulary_size, vocabulary.size)
        limits.check_tokens("sampling.stop_token_ids", sampling.stop_token_ids, smallest)
        limits.check_tokens("sampling.forced_token_ids", sampling.forced_token_ids, smallest)
        limits.check_tokens("sampling.logit_bias", (token_id for token_id, _ in sampling.logit_bias), smallest)
        ids = await self._tokenize(request.prompt, vocabulary, request.tools)
        if request.forced_answer is not None:
            sampling = await self._force(request.forced_answer, sampling, len(ids), vocabulary)
        sampling = complete_sampling(sampling, len(ids), self._models.context_tokens, vocabulary.end_tokens)
        grammar = await self._grammar(replace(request, sampling=sampling), vocabulary)
        turns = await self._turns(request.prompt, vocabulary)
        decision = self._selector.select(request.routing, turns, len(ids), waited_seconds())
        if request.prompt_logprobs:
            limits.check_prompt_logprobs(sampling, isinstance(decision, RouteDecision))
        return Prepared(
            request,
            StreamInput(request.request_id, tuple(ids), decision, sampling, facts=facts, grammar=grammar),
            vocabulary,
        )

    async def _grammar(self, request: Request, vocabulary: Vocabulary) -> Grammar | None:
        if request.response_format is None and request.tools is None:
            return None
        return await self._queues.compile(lambda: answer_grammar(request, vocabulary))

    async def tokenize(
        self, prompt: Prompt, tools: Tools | None = None, plain: bool = False
    ) -> inference_pb2.TokenizeResponse:
        """The tokens of a prompt; `plain`: without the special tokens that the tokenizer adds to a text.

        Raises as `prepare` does.
        """
        limits.check_prompt(prompt)
        vocabulary, context_tokens = self._source.require(), self._models.context_tokens
        ids = await self._tokenize(prompt, vocabulary, tools, plain)
        tokens = await self._queues.run(len(ids), lambda: list(map(vocabulary.token_bytes, ids)))
        return inference_pb2.TokenizeResponse(token_ids=ids, tokens=tokens, context_length=context_tokens)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens by their names. Raises as `prepare` does."""
        vocabulary, context_tokens = self._source.require(), self._models.context_tokens
        limits.check_count("token_ids", ids, context_tokens, "ids")
        limits.check_tokens("token_ids", ids, vocabulary.size)
        return await self._queues.run(BYTES_PER_TOKEN * len(ids), lambda: vocabulary.decode(ids, control_tokens=True))

    async def _tokenize(
        self, prompt: Prompt, vocabulary: Vocabulary, tools: Tools | None, plain: bool = False
    ) -> list[int]:
        context_tokens = self._models.context_tokens
        if isinstance(prompt, TokenIds):
            limits.check_fits(prompt, len(prompt.ids), context_tokens)
            largest = min(self._models.prompt_vocabulary_size, vocabulary.size)
            limits.check_tokens("token_ids.ids", prompt.ids, largest)
            return list(prompt.ids)
        limits.check_size(prompt, context_tokens, vocabulary.max_token_bytes)
        if tools is not None or (not isinstance(prompt, str) and any(turn.tool_calls for turn in prompt)):
            # In a thread: the parsers of a response template take a second to import.
            await self._queues.compile(lambda: tool_syntax(vocabulary))
        size = limits.size_bytes(prompt) + (0 if tools is None else tools.size_bytes)
        ids = await self._queues.run(size, lambda: tokenize(prompt, vocabulary, context_tokens, tools, plain))
        limits.check_fits(prompt, len(ids), context_tokens)
        limits.check_text_tokens(limits.field_of(prompt), ids, self._models.prompt_vocabulary_size)
        return ids

    async def _turns(self, prompt: Prompt, vocabulary: Vocabulary) -> tuple[str, ...]:
        """The user's texts, by which the router decides; token ids are one, as their text."""
        if not isinstance(prompt, TokenIds):
            return user_turns(prompt)
        ids = prompt.ids
        return (await self._queues.run(BYTES_PER_TOKEN * len(ids), lambda: vocabulary.decode(ids)),)

    async def _force(self, answer: str, sampling: Sampling, prompt_tokens: int, vocabulary: Vocabulary) -> Sampling:
        """The sampling that gives exactly this answer."""
        context_tokens = self._models.context_tokens
        limits.check_forced(answer, sampling.forced_token_ids, context_tokens * vocabulary.max_token_bytes)
        ids = await self._queues.run(
            limits.size_bytes(answer), lambda: tokenize_answer(answer, vocabulary, context_tokens)
        )
        limits.check_answer_fits(len(ids), context_tokens - prompt_tokens)
        limits.check_text_tokens("forced_answer", ids, self._models.vocabulary_size)
        return replace(sampling, forced_token_ids=tuple(ids), max_tokens=min(sampling.max_tokens, len(ids)))


def tokenize(
    prompt: str | tuple[Turn, ...],
    vocabulary: Vocabulary,
    context_tokens: int,
    tools: Tools | None = None,
    plain: bool = False,
) -> list[int]:
    """Token ids of a prompt; `plain`: of a text without the special tokens that the tokenizer adds.

    Raises InvalidRequest where the chat template refuses the conversation, or for a text over `context_tokens`; one
    that has a few more may be returned.
    """
    with _refused_texts(limits.field_of(prompt), context_tokens):
        if isinstance(prompt, str):
            return (vocabulary.encode_rendered if plain else vocabulary.encode)(prompt, context_tokens)
        roles = ", ".join(turn.role for turn in prompt)
        if vocabulary.template is None:
            raise InvalidRequest("chat", roles, f"{vocabulary.template_absence}, so it takes a prompt only")
        try:
            return vocabulary.encode_chat(prompt, context_tokens, () if tools is None else tools.offered)
        except TemplateRefusal as error:
            raise InvalidRequest("chat", roles, f"the chat template refuses it: {shown(str(error), 200)}") from error


def tokenize_answer(answer: str, vocabulary: Vocabulary, context_tokens: int) -> list[int]:
    """Token ids of a forced answer, all of which are text. Raises InvalidRequest as `tokenize` does."""
    with _refused_texts("forced_answer", context_tokens):
        return vocabulary.encode_text(answer, context_tokens)


@contextmanager
def _refused_texts(field: str, context_tokens: int) -> Iterator[None]:
    """Raises InvalidRequest in place of the vocabulary's errors about a text."""
    try:
        yield
    except TextTooLong as error:
        limit = f"the context holds {context_tokens:,}, the answer included"
        raise InvalidRequest(field, limits.Amount(f"at least {error.tokens:,} tokens"), limit) from error
    except ControlTokenInText as error:
        limit = "the model has no other tokens for the name of a control token in it"
        raise InvalidRequest(field, limits.Amount("a text"), limit) from error


def complete_sampling(
    sampling: Sampling, prompt_tokens: int, context_tokens: int, end_tokens: tuple[int, ...]
) -> Sampling:
    """With both numbers of tokens limited to the context, and with the model's end tokens unless they are ignored."""
    stop = sampling.stop_token_ids
    if not sampling.ignore_eos:
        stop = tuple(dict.fromkeys((*stop, *end_tokens)))
    most = min(sampling.max_tokens, context_tokens - prompt_tokens)
    return replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most), stop_token_ids=stop)


def within_tenant(request: Request, tenant: Tenant) -> Request:
    """The request with its tenant's limit in place of a default that exceeds it, in its tenant's own conversation."""
    sampling, routing = request.sampling, request.routing
    if tenant.max_tokens is not None and sampling.max_tokens > tenant.max_tokens:
        sampling = replace(sampling, max_tokens=tenant.max_tokens)
    if routing.conversation_id:
        routing = replace(routing, conversation_id=f"{tenant.name}/{routing.conversation_id}")
    return replace(request, sampling=sampling, routing=routing)


class DeltaBuilder:
    """Turns the tokens of one answer into deltas.

    A token without final text waits for the next delta, so that every token is in exactly one. No stop string ends
    with the first `min_tokens`. Before the answer come `scored` tokens of the prompt, whose deltas have no text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str],
        parser: ToolCallParser | None = None,
        min_tokens: int = 0,
        scored: int = 0,
    ) -> None:
        self._vocabulary = vocabulary
        self._detokenizer = vocabulary.detokenizer(() if parser is None else parser.shown)
        self._parser = parser
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self._scored = scored
        self._waiting: list[shard_pb2.GeneratedToken] = []
        self._calls = 0
        self.generated_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, or the only call that may be made, which completes the answer."""
        return self._stop.found or (self._parser is not None and self._parser.done)

    @property
    def calls_tools(self) -> bool:
        return self._parser is not None and self._parser.calls > 0

    def push(self, tokens: Iterable[shard_pb2.GeneratedToken]) -> inference_pb2.Delta | None:
        """The next delta; None while no further text is final. Tokens after a stop string are dropped."""
        text, scored = "", self._scored
        for token in tokens:
            if self.stopped:
                break
            self._waiting.append(token)
            if self._scored:
                self._scored -= 1
                continue
            self.generated_tokens += 1
            text += self._stop.push(self._detokenizer.push(token.id), self.generated_tokens > self._min_tokens)
        return self._delta(text) if text or scored else None

    def finish(self) -> inference_pb2.Delta | None:
        """The delta of the remaining text and tokens; None where there are neither."""
        text = "" if self.stopped else self._stop.push(self._detokenizer.finish()) + self._stop.finish()
        return self._delta(text, final=True) if text or self._waiting or self._parser is not None else None

    def _delta(self, text: str, final: bool = False) -> inference_pb2.Delta | None:
        found = [text] if self._parser is None else self._parser.push(text, final)
        if not (found or (final and self._waiting)):
            return None
        tokens, self._waiting = self._waiting, []
        return inference_pb2.Delta(
            text="".join(one for one in found if isinstance(one, str)),
            tool_calls=[self._call(one) for one in found if not isinstance(one, str)],
            token_ids=[token.id for token in tokens],
            logprobs=[self._spelled(token.logprobs) for token in tokens if token.HasField("logprobs")],
        )

    def _call(self, call: ToolCall) -> inference_pb2.ToolCallDelta:
        """A call, which is sent whole: only a whole one is known to be a call."""
        index, self._calls = self._calls, self._calls + 1
        return inference_pb2.ToolCallDelta(index=index, id=call.id, name=call.name, arguments=call.arguments)

    def _spelled(self, logprobs: inference_pb2.TokenLogprobs) -> inference_pb2.TokenLogprobs:
        """With the bytes of each token, which shards don't know."""
        logprobs.token = self._vocabulary.token_bytes(logprobs.token_id)
        for one in logprobs.alternatives:
            one.token = self._vocabulary.token_bytes(one.token_id)
        return logprobs


@dataclass(slots=True)
class AnswersInCommon:
    """What the answers to one request share."""

    unfinished: int
    # The first answer has its first token: the others can reuse the KV of the prompt on the shards of this chain.
    prompt_computed: asyncio.Event = field(default_factory=asyncio.Event)
    decision: RouteDecision | None = None
    chain: Chain | None = None


async def interleaved(answers: Sequence[AsyncGenerator[Response, None]]) -> AsyncGenerator[Response, None]:
    """The messages of all answers as they come. One that fails ends the others, as closing the iterator does."""
    queue: asyncio.Queue[Response | None] = asyncio.Queue(QUEUED_MESSAGES)

    async def forward(answer: AsyncGenerator[Response, None]) -> None:
        async with aclosing(answer):
            async for response in answer:
                await queue.put(response)

    async def run() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for answer in answers:
                    group.create_task(forward(answer))
        except BaseExceptionGroup as failures:
            await queue.put(None)
            raise failures.exceptions[0] from None
        await queue.put(None)

    work = asyncio.create_task(run())
    try:
        while (response := await queue.get()) is not None:
            yield response
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


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
                waits = partial(_seconds_to_start, recorder, ticket)
                prepared = await self._preparer.prepare(request, waits)
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


def _seconds_to_start(recorder: Recorder, ticket: Ticket) -> float:
    """From a request's arrival until shards have room for it."""
    return recorder.elapsed_seconds() + ticket.wait_seconds()
