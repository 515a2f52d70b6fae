"""Checks and tokenizes a request and selects its route: a `Request` in, what shards compute its answers from out.

Every refusal is raised here, before a shard is asked. Texts are tokenized on the event loop where they are short, else
in a thread (`tokenization/text_queues.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from router_gateway.admission.tenants import Tenant
from router_gateway.requests import limits
from router_gateway.requests.answer_format import answer_grammar, tool_syntax
from router_gateway.requests.stream import StreamInput
from router_gateway.requests.types import Prompt, Request, TokenIds, Tools, user_turns
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.selector import NO_WAIT, Selector, Wait
from router_gateway.shards.models import ModelRegistry
from router_gateway.tokenization.chat_template import TemplateRefusal, Turn
from router_gateway.tokenization.control_tokens import ControlTokenInText
from router_gateway.tokenization.source import VocabularySource
from router_gateway.tokenization.text_queues import TextQueues
from router_gateway.tokenization.vocabulary import TextTooLong, Vocabulary
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest, shown
from stitch.grammar import Grammar
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2

# A token's text, by which decoding is queued.
BYTES_PER_TOKEN = 4


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

    async def prepare(self, request: Request, wait: Callable[[], Wait] = lambda: NO_WAIT) -> Prepared:
        """Raises InvalidRequest, ObjectivesUnmet, Exhausted, or Unavailable before the first shard has answered.

        `wait` returns how long the request will have waited for shards.
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
        decision = self._selector.select(request.routing, turns, len(ids), wait())
        if request.prompt_logprobs:
            route = self._cluster.route(decision.route) if isinstance(decision, RouteDecision) else None
            limits.check_prompt_logprobs(sampling, route)
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
    """The request as its tenant's: with its limit in place of a default that exceeds it, in its own conversation."""
    sampling, routing = request.sampling, replace(request.routing, tenant=tenant.name)
    if tenant.max_tokens is not None and sampling.max_tokens > tenant.max_tokens:
        sampling = replace(sampling, max_tokens=tenant.max_tokens)
    if routing.conversation_id:
        routing = replace(routing, conversation_id=f"{tenant.name}/{routing.conversation_id}")
    return replace(request, sampling=sampling, routing=routing)
