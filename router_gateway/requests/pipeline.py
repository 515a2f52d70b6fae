"""One request, top to bottom: check, tokenize, select a route, stream tokens, detokenize, finish.

In goes a `Request`, out come the messages of its answer: `started` once, any number of `delta`s, `finished` once. Every
refusal is raised before a shard is asked. Texts are tokenized on the event loop where they are short, else in a thread
(`tokenization/text_queues.py`).
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from router_gateway.admission.admission import Admission, Demand, Ticket
from router_gateway.admission.tenants import Credentials, Tenant
from router_gateway.metrics import Metrics
from router_gateway.requests import limits
from router_gateway.requests.answer_format import answer_grammar, tool_call_parser, tool_syntax
from router_gateway.requests.failover import Failover, FailoverDependencies
from router_gateway.requests.recorder import Recorder
from router_gateway.requests.request_log import Write, write_line
from router_gateway.requests.stream import FinishReason, Step, StreamInput, TokenStream
from router_gateway.requests.types import Prompt, Request, Tools, user_turns
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.selector import Selector
from router_gateway.routing.ttft_predictor import TrackedRequest, TtftPredictor
from router_gateway.shards.models import ModelRegistry
from router_gateway.shards.placement import Prompt as PlacedPrompt
from router_gateway.tokenization.chat_template import TemplateRefusal, ToolCall
from router_gateway.tokenization.control_tokens import ControlTokenInText
from router_gateway.tokenization.detokenizer import Detokenizer
from router_gateway.tokenization.source import VocabularySource
from router_gateway.tokenization.stop_strings import StopStrings
from router_gateway.tokenization.text_queues import TextQueues
from router_gateway.tokenization.tool_calls import ToolCallParser
from router_gateway.tokenization.vocabulary import TextTooLong, Vocabulary
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest, Unavailable, shown
from stitch.grammar import Grammar
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2, shard_pb2

Response = inference_pb2.GenerateResponse


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that has passed every check, with what its answer is made from."""

    request: Request
    stream_input: StreamInput
    vocabulary: Vocabulary

    @property
    def prompt_tokens(self) -> int:
        return len(self.stream_input.token_ids)


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
        smallest = min(self._models.vocabulary_size, vocabulary.size)
        for field in ("stop_token_ids", "forced_token_ids"):
            limits.check_tokens(field, getattr(request.sampling, field), smallest)
        ids = await self._tokenize(request.prompt, vocabulary, request.tools)
        sampling = request.sampling
        if request.forced_answer is not None:
            sampling = await self._force(request.forced_answer, sampling, len(ids), vocabulary)
        sampling = complete_sampling(sampling, len(ids), self._models.context_tokens, vocabulary.end_tokens)
        grammar = await self._grammar(replace(request, sampling=sampling), vocabulary)
        decision = self._selector.select(request.routing, user_turns(request.prompt), len(ids), waited_seconds())
        return Prepared(
            request,
            StreamInput(request.request_id, tuple(ids), decision, sampling, facts=facts, grammar=grammar),
            vocabulary,
        )

    async def _grammar(self, request: Request, vocabulary: Vocabulary) -> Grammar | None:
        if request.response_format is None and request.tools is None:
            return None
        return await self._queues.compile(lambda: answer_grammar(request, vocabulary))

    async def _tokenize(self, prompt: Prompt, vocabulary: Vocabulary, tools: Tools | None) -> list[int]:
        context_tokens = self._models.context_tokens
        limits.check_size(prompt, context_tokens, vocabulary.max_token_bytes)
        size = limits.size_bytes(prompt) + (0 if tools is None else tools.size_bytes)
        ids = await self._queues.run(size, lambda: tokenize(prompt, vocabulary, context_tokens, tools))
        limits.check_fits(prompt, len(ids), context_tokens)
        limits.check_text_tokens(limits.field_of(prompt), ids, self._models.prompt_vocabulary_size)
        return ids

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


def tokenize(prompt: Prompt, vocabulary: Vocabulary, context_tokens: int, tools: Tools | None = None) -> list[int]:
    """Token ids of a prompt.

    Raises InvalidRequest where the chat template refuses the conversation, or for a text over `context_tokens`; one
    that has a few more may be returned.
    """
    with _refused_texts(limits.field_of(prompt), context_tokens):
        if isinstance(prompt, str):
            return vocabulary.encode(prompt, context_tokens)
        roles = ", ".join(turn.role for turn in prompt)
        if vocabulary.template is None:
            raise InvalidRequest("chat", roles, f"{vocabulary.template_absence}, so it takes a prompt only")
        if tools is not None or any(turn.tool_calls for turn in prompt):
            tool_syntax(vocabulary)
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
    """With max_tokens limited to the context, and with the model's end tokens unless they are ignored."""
    stop = sampling.stop_token_ids
    if not sampling.ignore_eos:
        stop = tuple(dict.fromkeys((*stop, *end_tokens)))
    return replace(sampling, max_tokens=min(sampling.max_tokens, context_tokens - prompt_tokens), stop_token_ids=stop)


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

    A token without final text waits for the next delta, so that every token is in exactly one.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], parser: ToolCallParser | None = None) -> None:
        self._detokenizer = detokenizer
        self._parser = parser
        self._stop = StopStrings(stop)
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
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.generated_tokens += 1
            self._waiting.append(token)
            text += self._stop.push(self._detokenizer.push(token.id))
        return self._delta(text) if text else None

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
            logprobs=[token.logprobs for token in tokens if token.HasField("logprobs")],
        )

    def _call(self, call: ToolCall) -> inference_pb2.ToolCallDelta:
        """A call, which is sent whole: only a whole one is known to be a call."""
        index, self._calls = self._calls, self._calls + 1
        return inference_pb2.ToolCallDelta(index=index, id=call.id, name=call.name, arguments=call.arguments)


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
    ) -> None:
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

    async def decide(self, credentials: Credentials, request: Request) -> tuple[RouteDecision, int]:
        """The route of a query and its number of prompt tokens, without an answer.

        A deferred decision is the first shard's: its session asks for one token and is closed once it has decided.
        """
        query = replace(request, request_id=uuid.uuid4().hex, sampling=Sampling(max_tokens=1))
        with self._admission.admit(credentials, _demand(query, None)) as ticket:
            prepared = await self._preparer.prepare(within_tenant(query, ticket.tenant))
            decision = prepared.stream_input.decision
            if isinstance(decision, RouteDecision):
                return decision, prepared.prompt_tokens
            await self._start_on_shards(prepared, ticket)
            async with aclosing(self._steps(prepared, ticket)) as steps:
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
    ) -> AsyncGenerator[Response, None]:
        """The messages of one answer. Closing the iterator cancels its session on every shard.

        `read` makes the request from the client's message; it is called here so that its refusal is recorded too.
        `write` logs the request.
        Raises any StitchError; see `Admission.admit`, `RequestPreparer.prepare` and `TokenStream.steps`.
        """
        with Recorder(arrival, deadline, self._metrics, self._dependencies.clock, self._aborting, write) as recorder:
            request = read()
            recorder.request_id = request.request_id
            with self._admission.admit(credentials, _demand(request, deadline)) as ticket:
                request = within_tenant(request, ticket.tenant)
                waits = partial(_seconds_to_start, recorder, ticket)
                prepared = await self._preparer.prepare(request, waits)
                recorder.record_prompt(prepared.prompt_tokens, request.routing.objectives.max_ttft_seconds)
                recorder.record_wait(await self._start_on_shards(prepared, ticket))
                with self._predictor.track(prepared.prompt_tokens) as tracked, ticket.refusals():
                    async with aclosing(self._answer(prepared, ticket, recorder, tracked)) as responses:
                        async for response in responses:
                            yield response

    async def _answer(
        self, prepared: Prepared, ticket: Ticket, recorder: Recorder, tracked: TrackedRequest
    ) -> AsyncGenerator[Response, None]:
        parser = tool_call_parser(prepared.request.tools, prepared.vocabulary)
        shown = () if parser is None else parser.shown
        builder = DeltaBuilder(prepared.vocabulary.detokenizer(shown), prepared.request.stop, parser)
        reason = inference_pb2.FINISH_REASON_LENGTH
        if isinstance(decision := prepared.stream_input.decision, RouteDecision):
            yield self._start(prepared, decision, recorder, tracked)
        recorder.record_placement()
        async with aclosing(self._steps(prepared, ticket)) as steps:
            async for step in steps:
                if step.decision is not None:
                    yield self._start(prepared, step.decision, recorder, tracked)
                if step.tokens:
                    tracked.prompt_computed()
                    ticket.record_tokens(len(step.tokens))
                    recorder.record_tokens(len(step.tokens), step.stages)
                if (delta := builder.push(step.tokens)) is not None:
                    yield _delta(delta, recorder, tracked)
                if builder.stopped:
                    break
                reason = step.finish or reason
        if (delta := builder.finish()) is not None:
            yield _delta(delta, recorder, tracked)
        reason = inference_pb2.FINISH_REASON_STOP if builder.stopped else reason
        if reason == inference_pb2.FINISH_REASON_STOP and builder.calls_tools:
            reason = inference_pb2.FINISH_REASON_TOOL_CALLS
        ticket.record_finish(at_limit=reason == inference_pb2.FINISH_REASON_LENGTH)
        yield _finish(reason, prepared, builder.generated_tokens, recorder)

    async def _start_on_shards(self, prepared: Prepared, ticket: Ticket) -> float:
        """Waits until shards have room for the request, and returns for how many seconds."""
        began, given, request = self.now(), prepared.stream_input, prepared.request
        is_exact = request.forced_answer is not None or (given.sampling.ignore_eos and not request.stop)
        await ticket.start(given.routes[-1], prepared.prompt_tokens, given.sampling.max_tokens, is_exact)
        return self.now() - began

    def _steps(self, prepared: Prepared, ticket: Ticket) -> AsyncGenerator[Step, None]:
        tenant = ticket.tenant
        given = replace(prepared.stream_input, tenant=tenant.name, tenant_weight=tenant.weight)
        prompt = PlacedPrompt(tenant.name, given.token_ids)
        failover = Failover(given.routes, self._dependencies, given.facts, prompt)
        return TokenStream(given, failover, ticket.deadline, self._dependencies.clock).steps()

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


def _delta(delta: inference_pb2.Delta, recorder: Recorder, tracked: TrackedRequest) -> Response:
    if delta.text:
        recorder.record_text()
        tracked.text_sent()
    return Response(delta=delta)


def _finish(reason: FinishReason, prepared: Prepared, generated_tokens: int, recorder: Recorder) -> Response:
    recorder.record_finish(reason)
    return Response(
        finished=inference_pb2.Finished(
            reason=reason,
            prompt_tokens=prepared.prompt_tokens,
            generated_tokens=generated_tokens,
            ttft_seconds=recorder.ttft_seconds,
            total_seconds=recorder.elapsed_seconds(),
            stages=recorder.stages,
        )
    )


def _demand(request: Request, deadline: float | None) -> Demand:
    max_tokens = request.sampling.max_tokens if request.sets_max_tokens else None
    return Demand(max_tokens, request.routing.route, deadline, partial(_digest, request))


def _digest(request: Request) -> bytes:
    """Of what a client sends again when it comes back; where it sets no seed, each request is drawn another one."""
    sampling = replace(request.sampling, seed=0)
    content = (request.prompt, sampling, request.stop, request.routing, request.forced_answer)
    asked = repr((content, request.response_format, request.tools))
    return hashlib.blake2b(asked.encode(errors="surrogatepass"), digest_size=16).digest()


def _seconds_to_start(recorder: Recorder, ticket: Ticket) -> float:
    """From a request's arrival until shards have room for it."""
    return recorder.elapsed_seconds() + ticket.wait_seconds()
